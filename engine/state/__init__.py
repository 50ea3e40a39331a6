"""What a training state consists of: its tensors under stable names and, beside them, JSON values."""
