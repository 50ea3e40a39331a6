"""GPT-2: configuration, module, seeded initial weights. Knows nothing of the engine."""
