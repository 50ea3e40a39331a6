"""The program `python -m engine.checkpoints`: look at, verify, hold and prune checkpoints. No torch.

Only export, import, merge and diff bring it in, when they run: they read tensors."""
