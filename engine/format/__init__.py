"""The on-disk format as pure values: bytes in, values out. No I/O and no torch in this package."""
