"""From a committed checkpoint back to live training state, at any world size."""
