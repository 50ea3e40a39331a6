"""The parts of `bench/remote.py`: rows, the process of each row, and the report."""
