"""The contents of a checkpoint directory: list, select, verify, mark, retain, delete. No torch."""
