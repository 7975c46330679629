"""Lines for the user."""


def say(line: object) -> None:
    """Print a line at once."""
    print(line, flush=True)
