"""What there is to save of a training state: tensors under stable names, and JSON values."""
