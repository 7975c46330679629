"""`videoar units`: partitions as tables and pictures."""

from videoar.cli import options
from videoar.cli.progress import say
from videoar.core.schemes import parse
from videoar.data.video import check_output
from videoar.evaluation.tables import cells, columns
from videoar.files import check_folder


def draw_units(args: options.DrawUnits) -> None:
    """Print partitions as a table, and draw them."""
    names, folder = dict.fromkeys(args.schemes), args.out
    files = ["order.png", "mask.png", "filling.webp"] if len(names) == 1 else ["units.webp"]
    if folder is not None:
        check_folder(folder)
        for file in files if folder.is_dir() else ():
            check_output(folder / file, overwrite=args.force)
    from videoar.cli import drawing
    from videoar.core.cache import cached_tokens
    from videoar.core.units import Units
    from videoar.generation.config import GenerationConfig

    size = (args.frames, args.height, args.width)
    lattices, rows = {name: Units(parse(name), *size) for name in names}, []
    for name, units in lattices.items():
        if folder is not None:
            drawing.check_size(units)
        sampling = GenerationConfig(units=name, window_frames=args.window, sink_frames=args.sink)
        visible = sampling.visible(units)
        waves = int(units.waves.max()) + 1
        row = {"scheme": name, "units": len(units.sizes)}
        row |= {"tokens per unit": ", ".join(map(str, sorted(set(units.sizes))))}
        row |= {"waves": waves, "passes": waves * args.steps}
        rows.append(row | {"cached tokens": cached_tokens(units, visible)})
    say("{} x {} x {} tokens, {} steps per unit".format(*size, args.steps))
    say(columns(cells(rows)))
    if folder is None:
        return
    folder.mkdir(exist_ok=True)
    if len(names) == 1:
        title = "{} on {} x {} x {}".format(name, *size)
        drawing.order(units, title=title).save(folder / "order.png")
        drawing.mask(units, visible, title=title).save(folder / "mask.png")
    drawing.save_animation(drawing.filling(lattices, steps=args.steps), folder / files[-1])
    say(f"drawn in {folder}: {', '.join(files)}")
