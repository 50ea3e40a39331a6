"""The program `python -m engine.checkpoints`: list, verify, copy, hold, prune, convert checkpoints. No torch.

Only export, import, merge and diff load torch, when they run: they read tensors."""
