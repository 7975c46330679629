"""Checkpoints of any format: found, loaded, saved, converted."""
