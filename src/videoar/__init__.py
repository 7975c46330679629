"""VideoAR: autoregressive video generation in which the prediction unit is a choice."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is asked for, so that `videoar --help` does without torch."""
    if name == "VideoPipeline":
        return importlib.import_module("videoar.generation.pipeline").VideoPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
