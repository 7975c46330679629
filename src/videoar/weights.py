"""Foreign files of weights: safetensors, pickles of torch, shards, and what is wrapped around them.

Files are mapped into memory, so a tensor costs nothing until it is used. Pickles are read with
`weights_only=True`: code in them is refused, not run.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoar.checkpoint import read_json, read_safetensors

Weights = dict[str, Tensor]
# What trainers wrap around the weights; where there are several, the first is what is used.
WRAPPERS = ("generator_ema", "generator", "generator_lora", "model", "state_dict")


def split_entry(source: Path) -> tuple[Path, str | None]:
    """Split `FILE#ENTRY`."""
    if source.exists() or "#" not in source.name:
        return source, None
    name, _, entry = source.name.rpartition("#")
    return source.with_name(name), entry


def read_weights(source: Path) -> Weights:
    """Read the tensors of a file or of a folder of shards, without what is wrapped around them."""
    source, entry = split_entry(source)
    return unwrap(read_file(source), entry=entry, file=source)[0]


def read_file(source: Path) -> dict[str, Any]:
    """Read what a file or a folder of shards holds, wrappers and all."""
    if source.is_dir():
        return _read_shards(source)
    if not source.is_file():
        raise ValueError(f"there is no file {source}; copy or download it")
    if source.suffix == ".safetensors":
        return dict(read_safetensors(source))
    damaged = (
        f"{source} ({source.stat().st_size} bytes) is truncated or damaged; "
        "copy or download it again"
    )
    with source.open("rb") as file:
        mapped = file.read(2) == b"PK"
    if mapped and not zipfile.is_zipfile(source):
        raise ValueError(damaged)
    try:
        # What was saved before torch 1.6 is no zip file and cannot be mapped.
        tree = torch.load(source, map_location="cpu", mmap=mapped or None, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if not any(word in str(error) for word in ("GLOBAL", "Unsupported class")):
            raise ValueError(damaged) from error
        raise ValueError(
            f"{source} holds more than tensors, and what else it holds could run code; it is not "
            "read: ask its author for safetensors"
        ) from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source} holds a {type(tree).__name__}, not named tensors; use another")
    return dict(tree)


def _read_shards(folder: Path) -> Weights:
    """Read the safetensors of a folder: those that the index names, or the only file."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if indices:
        placed = read_json(indices[0]).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{indices[0]} names no files; copy or download it again")
        files = [folder / name for name in sorted(set(placed.values()))]
    if not files or (len(files) > 1 and not indices):
        raise ValueError(
            f"{folder} has {len(files)} safetensors files and no index that says which belong "
            "together; pass one file, or a folder of one model"
        )
    if lost := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(lost)} of {len(files)} shards ({', '.join(lost)}); "
            "copy or download them"
        )
    return {key: tensor for file in files for key, tensor in read_safetensors(file).items()}


def unwrap(
    tree: Mapping[str, Any], *, entry: str | None = None, file: Path
) -> tuple[Weights, list[str]]:
    """Descend to the tensors; return them and the names of what was around them."""
    path = []
    while True:
        inner = [key for key, value in tree.items() if isinstance(value, Mapping)]
        if entry is not None and entry not in inner:
            raise ValueError(f"{file} has no entry {entry!r}; it has {', '.join(inner) or 'none'}")
        name = entry or next((key for key in WRAPPERS if key in inner), None)
        if name is None:
            break
        tree, entry = tree[name], None
        path.append(name)
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{file} holds no tensors at its top, only {', '.join(map(str, tree)) or 'nothing'}; "
            f"choose one with {file}#ENTRY"
        )
    return tensors, path
