"""Measures what a checkpoint costs a training loop: Holdfast beside its peers, in one run."""
