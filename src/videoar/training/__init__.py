"""The loop, its objectives and its recipes."""
