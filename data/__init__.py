"""Token data: tokenizes text into shards, and reads shards as reproducible batches.

    python -m data.prepare     text -> shards (sources, documents, encode, splits, folder)
    data.loader.TokenLoader    shards -> batches (dataset, fingerprint, permutation, sequences, batch)

Imports nothing of `engine` or `model`, and no torch: batches are numpy arrays.
"""
