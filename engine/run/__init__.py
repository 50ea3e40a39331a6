"""The trainer: configuration, start rules, the loop, preemption and events."""
