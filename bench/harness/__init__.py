"""What the benchmarks share: command lines, ranks, floors, records, provenance, tables and pictures."""
