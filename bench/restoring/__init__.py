"""The parts of `bench/restore.py`."""
