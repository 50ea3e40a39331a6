"""The only room that knows `torch.distributed.checkpoint`: its planners on one side, our values on the other."""
