"""How fast shards travel to an S3 store and back."""
