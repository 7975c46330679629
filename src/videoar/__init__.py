"""VideoAR: autoregressive video generation in which the prediction unit is a choice."""

__version__ = "0.1.0"
