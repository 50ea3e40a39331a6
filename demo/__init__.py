"""The demonstration behind `make demo`: train, kill, resume on more ranks, compare."""
