"""From live training state to a committed checkpoint: staging buffer, shard files, manifest."""
