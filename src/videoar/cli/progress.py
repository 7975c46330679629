"""Lines for the user."""


def say(line: object) -> None:
    """Print a line at once."""
    text = str(line).encode("utf-8", "backslashreplace").decode()  # names of files may be no text
    print(text, flush=True)
