"""The second tier: copies of committed checkpoints, and what is still owed to it. No torch."""
