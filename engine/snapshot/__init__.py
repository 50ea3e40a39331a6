"""From live training state to one host buffer that is laid out as the shard file itself."""
