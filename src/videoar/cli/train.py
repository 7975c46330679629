"""`videoar train` and `videoar distill`."""

import os

from videoar.cli import options
from videoar.cli.progress import say
from videoar.machine import check_device
from videoar.training import loop, recipes


def train(args: options.Train, *, config: loop.TrainConfig | None = None) -> None:
    """Train a recipe, export a run, or list the recipes."""
    distils = isinstance(args, options.Distill)
    if args.list or args.recipe is None:
        chosen = recipes.DISTILLATIONS if distils else recipes.RECIPES
        for name, recipe in chosen.items():
            say(f"{name:<18} {(recipe.__doc__ or '').splitlines()[0]}")
        return
    config = config or recipes.find(args.recipe)
    if distils and not recipes.distils(config):
        known = ", ".join(recipes.DISTILLATIONS)
        raise ValueError(f"{args.recipe} distils nothing: train it, or use one of {known}")
    check_device(config.device)
    folder = loop.export(config) if args.export else loop.train(config, report=say)
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun the first one speaks
        say(f"the checkpoint is in {folder}")
