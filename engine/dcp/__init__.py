"""The only room that knows DCP's planners: their items on one side, our values on the other."""
