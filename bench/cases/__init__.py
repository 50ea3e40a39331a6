"""The benchmarks: what each one runs, its figures and its bars."""
