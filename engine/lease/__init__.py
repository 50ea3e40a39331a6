"""Who may write to a checkpoint directory: one run at a time, by a lease with a heartbeat. No torch."""
