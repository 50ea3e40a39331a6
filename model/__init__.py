"""GPT-2: configuration, module, seeded initial weights. Does not depend on the engine."""
