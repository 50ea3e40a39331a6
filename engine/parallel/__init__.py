"""How ranks are laid out, how a model is spread over them, and how they agree."""
