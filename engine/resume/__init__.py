"""Carrying a run on, as a program."""
