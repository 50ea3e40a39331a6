"""The mirror, a second directory with copies of committed checkpoints. No torch."""
