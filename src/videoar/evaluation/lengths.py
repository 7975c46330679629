"""How long the clips are that the judge reads, in seconds. No numpy: options are checked by it."""

MIN_SECONDS = 1.5  # shorter clips do not tell a bounce from a drift
WINDOW_SECONDS = 4.0  # of the first and last window in which long videos are judged
