"""`videoar units`: partitions as a table."""

from videoar.cli import options
from videoar.cli.progress import say
from videoar.core.cache import cached_tokens
from videoar.core.schemes import parse
from videoar.core.units import Units
from videoar.evaluation.tables import cells, columns
from videoar.generation.config import GenerationConfig


def print_units(args: options.PrintUnits) -> None:
    """Print partitions as a table."""
    size, rows = (args.frames, args.height, args.width), []
    for name in dict.fromkeys(args.schemes):
        units = Units(parse(name), *size)
        sampling = GenerationConfig(units=name, window_frames=args.window, sink_frames=args.sink)
        waves = int(units.waves.max()) + 1
        row = {"scheme": name, "units": len(units.sizes)}
        row |= {"tokens per unit": ", ".join(map(str, sorted(set(units.sizes))))}
        row |= {"waves": waves, "passes": waves * args.steps}
        rows.append(row | {"cached tokens": cached_tokens(units, sampling.visible(units))})
    say("{} x {} x {} tokens, {} steps per unit".format(*size, args.steps))
    say(columns(cells(rows)))
