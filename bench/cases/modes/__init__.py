"""The ways to save and restore that are compared: one class each, behind one interface."""
