"""What a checkpoint directory holds: list, select, verify, mark, retain and delete. No torch."""
