"""What a checkpoint directory holds: list, select, retain, remove, verify, and who may write. No torch."""
