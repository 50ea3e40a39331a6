"""How the ranks of one Checkpointer find each other and agree, without a collective of training's groups."""
