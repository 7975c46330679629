"""The idea: a partition of tokens, and what is written once against it."""
