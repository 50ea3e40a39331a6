"""What Python cannot do without holding the GIL, or not at the speed of memory: a few loops in C, optional.

Where there was no C compiler at installation, their callers take the slower way; the result is the same.
"""
