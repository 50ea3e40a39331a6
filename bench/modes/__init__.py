"""The ways to save that are compared: one class each, behind one interface."""
