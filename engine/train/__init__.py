"""The trainer as a program."""
