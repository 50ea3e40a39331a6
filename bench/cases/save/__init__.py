"""What a save costs a training loop."""
