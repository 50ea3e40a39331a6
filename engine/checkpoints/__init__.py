"""The program `python -m engine.checkpoints`: look at, verify, hold and prune checkpoints. No torch."""
