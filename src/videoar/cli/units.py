"""`videoar units`: partitions as a table, schedules as a matrix, and the search for a partition."""

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli.progress import say
from videoar.core.cache import cached_tokens
from videoar.core.flow import Rows
from videoar.core.schemes import parse
from videoar.core.units import Units
from videoar.evaluation.options import PrintUnits
from videoar.evaluation.tables import cells, columns
from videoar.generation.config import GenerationConfig
from videoar.generation.schedules import num_passes
from videoar.weights import build_config


def print_units(args: PrintUnits) -> None:
    """Print partitions as a table, and how their sigmas fall."""
    if args.search is not None:
        from videoar.evaluation import search  # with all that generates

        say(search.run(args, say))
        return
    size, rows, drawn = (args.frames, args.height, args.width), [], []
    sampling = GenerationConfig(window_frames=None, sink_frames=0)
    if args.model is not None:
        found = Checkpoint.find(args.model)
        stated = {k: v for k, v in found.sampling(None).items() if k not in ("height", "width")}
        sampling = build_config(GenerationConfig, stated, file=found.source)
    for name in dict.fromkeys(args.schemes):
        units = Units(parse(name), *size)
        config = sampling.replaced(units=name, **args.changes).sampler(units)
        table = config.rows(int(units.waves.max()) + 1)
        row = {"scheme": name, "units": len(units.sizes)}
        row |= {"tokens per unit": ", ".join(map(str, sorted(set(units.sizes))))}
        row |= {"waves": table.waves, "steps": ", ".join(str(len(s) - 1) for s in table.sigmas)}
        row |= {"passes": num_passes(table), "cached tokens": cached_tokens(units, config.visible)}
        rows.append(row)
        drawn += [] if args.schedule is None else ["", f"{name}, {args.schedule}:", matrix(table)]
    say("{} x {} x {} tokens".format(*size))
    say("\n".join([columns(cells(rows)), *drawn]))


def matrix(rows: Rows) -> str:
    """Write the sigma of every wave before every row; the last line is the result."""
    waves = range(rows.waves or 0)
    last = 2 + max(rows.steps(wave)[-1] for wave in waves)
    table = [[f"{rows.of(w)[rows.done(row, w)]:.2g}" for w in waves] for row in range(last)]
    lines = [[str(row), *line] for row, line in enumerate(table)]
    return columns([["row", *map(str, waves)], *lines])
