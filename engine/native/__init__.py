"""A few optional loops in C, for work that Python cannot do without the GIL or at the speed of memory.

Without a C compiler at installation, callers use slower code with the same result.
"""
