"""From a filled arena to a committed checkpoint, on a background thread."""
