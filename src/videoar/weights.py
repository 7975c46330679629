"""Tensors and configs of files, and modules that take them over; ours and foreign ones.

Files are mapped into memory, so a tensor costs nothing until it is used. Pickles are read with
`weights_only=True`: code in them is refused, not run. Nothing here knows which modules there are.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from videoar.checks import Note, check, explained, import_extra, typed
from videoar.files import check_kind, write_json, written_whole

META = "videoar.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
AGAIN = "copy or download the checkpoint again"

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Device = torch.device | str
Weights = dict[str, Tensor]


def save_component(folder: Path, module: nn.Module) -> None:
    """Write a module and its `config`, a frozen dataclass from which it can be built again."""
    config: Any = module.config
    fields = {"class": type(module).__name__, **dataclasses.asdict(config)}
    save_weights(folder / WEIGHTS, module.state_dict(), fields)


def save_weights(file: Path, weights: Weights, config: Mapping[str, Any]) -> None:
    """Write tensors, which must not share memory, and their `config.json` beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Loaded tensors are a view of their file, so a file is replaced and never written over.
    write_safetensors(file, weights, {"format": "pt"})
    write_json(file.parent / CONFIG, config, allow_nan=False)


def load_component(folder: Path, *classes: type[ModuleT], device: Device = "cpu") -> ModuleT:
    """Build what `save_component` wrote, with the weights in the precision they have there.

    `classes` are those that may occur; each is made from the config that its `__init__` names.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; copy or download the folder again")
    values = read_json(config)
    name, known = values.pop("class", None), {each.__name__: each for each in classes}
    check(f"the class in {config}", repr(name), name in known, " or ".join(sorted(known)))
    config_class = typing.get_type_hints(known[name].__init__)["config"]
    module = build_empty(known[name], build_config(config_class, values, file=config))
    return assign_weights(module, read_safetensors(weights, device=device), file=weights)


def fingerprint(module: nn.Module) -> str:
    """Name the weights of a module: a hash of a thousand values of each, which costs no time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        some = tensor.flatten()[:: max(1, tensor.numel() // 1000)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


def write_safetensors(file: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> None:
    """Write a file whole or not at all; a full disk is an `OSError`, as it is elsewhere."""
    try:
        with written_whole(file) as partial:
            save_file({k: tensor.contiguous() for k, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def read_safetensors(file: Path, *, device: Device = "cpu") -> Weights:
    """Read a file; on the CPU its tensors are views of the mapped file and cost no memory."""
    head = check_kind(file)  # the size of the header comes first, in 8 bytes
    if head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
        raise ValueError(f"{file} is a pickle, not safetensors: let its name end in .pt")
    with explained(_damaged(file, " ({})"), SafetensorError):
        return load_file(file, device=str(device))


def _damaged(file: Path, why: str = "") -> str:
    size = file.stat().st_size
    return f"{file} ({size} bytes) is truncated or damaged{why}; copy or download it again"


def build_empty(module_class: Callable[[Any], ModuleT], config: Any) -> ModuleT:
    """Build a module on the meta device: no memory is spent on values that weights replace."""
    with torch.device("meta"), _NoInitialValues():
        return module_class(config)


def assign_weights(module: ModuleT, weights: Mapping[str, Tensor], *, file: Path) -> ModuleT:
    """Make tensors those of a module, all of them and without a copy, or say what does not fit."""
    wanted, kind = module.state_dict(), type(module).__name__
    whole = [key for key, tensor in weights.items() if not tensor.is_floating_point()]
    if packed := [key for key in whole if weights[key].ndim > 1 or key in wanted]:
        dtype = str(weights[packed[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{file} is quantised to {dtype}{_list(packed)}, which is not read; use the file in "
            "bfloat16, float16 or float8"
        )
    wrong = []
    if missing := [key for key in wanted if key not in weights]:
        wrong.append(f"lacks {len(missing)} of the {len(wanted)} tensors of {kind}{_list(missing)}")
    if unexpected := [key for key in weights if key not in wanted]:
        wrong.append(f"has {len(unexpected)} that {kind} does not know{_list(unexpected)}")
    if other := [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]:
        shape, needed = (tuple(tensors[other[0]].shape) for tensors in (weights, wanted))
        wrong.append(f"holds {other[0]!r} in shape {shape}, but {kind} needs {needed}")
    if wrong:
        remedy = "configuration and weights must come from the same checkpoint"
        raise ValueError(f"{file} {' and '.join(wrong)}; {remedy}")
    module.load_state_dict(weights, strict=True, assign=True)
    for buffer, tensor in module.named_buffers():
        assert not tensor.is_meta, f"buffer {buffer} is not saved: compute it in forward"
    return module


class _NoInitialValues(TorchFunctionMode):
    """Skip `torch.nn.init`: on meta tensors it imports the compiler, 1.5 s of every start."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        draws = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if draws or getattr(func, "__module__", "") == "torch.nn.init":
            return values["tensor"] if "tensor" in values else args[0]
        return func(*args, **values)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    check_kind(file)
    with explained(f"{file} is not JSON ({{}}); {AGAIN}", ValueError, RecursionError):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not an object; {AGAIN}")
    return values


def build_config(config_class: type, values: dict[str, Any], *, file: Path) -> Any:
    """Build a config from what JSON made of it."""
    try:
        return config_class(**typed(config_class, values))
    except (TypeError, ValueError) as error:
        remedy = ""
        if isinstance(error, TypeError):  # a field is missing or unknown
            known = ", ".join(f.name for f in dataclasses.fields(config_class) if f.init)
            remedy = f", of {known}; {AGAIN}, or update VideoAR"
        kind = config_class.__name__
        raise ValueError(f"{file} does not make a {kind}: {error}{remedy}") from error


def _list(keys: list[str]) -> str:
    """Write keys, after a space, in brackets, those of several layers as one."""
    alike: dict[str, list[str]] = {}
    for key in keys:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", key, count=1), []).append(key)
    counted = [f"{name!r} x {len(k)}" if k[1:] else repr(k[0]) for name, k in alike.items()]
    return f" ({', '.join(counted)})"


def usable(file: Path) -> contextlib.AbstractContextManager[None]:
    """Say in one sentence what a library finds wrong with a file."""
    # tokenizers raises no narrower kind
    return explained(f"{file} cannot be used ({{}}); copy or download it again", Exception)


def library(name: str) -> Any:
    """Import what the extra `wan` installs."""
    needed = f"Wan's codec and text encoder need {name.partition('.')[0]}"
    return import_extra(name, f"{needed} ({{}}); run `pip install -e '.[wan]'`")


# What trainers wrap around the weights; where there are several, the first is what is used.
WRAPPERS = ("generator_ema", "generator", "generator_lora", "model", "state_dict")


# Of a folder, in the order in which they are looked for.
WEIGHT_FILES = ("*.safetensors", "*model*.bin")
# What is saved beside weights and says nothing of them: states of libraries, tables of positions,
# counters of trainers, samplers and tokenizers of ComfyUI, and scales of activations.
NO_WEIGHTS = re.compile(
    r"(?:^|\.)(?:_extra_state|freqs(?:_\w+)?|accum_\w+|(?:model_sampling|pos_embedder)\..+"
    r"|scaled_fp8|spiece_model|scale_input|input_scale|comfy_quant)$"
)
SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)$")


def split_entry(source: Path) -> tuple[Path, str | None]:
    """Split `FILE#ENTRY`."""
    if source.exists() or "#" not in source.name:
        return source, None
    name, _, entry = source.name.rpartition("#")
    return source.with_name(name), entry


def read_weights(source: Path) -> Weights:
    """Read the tensors of a file or of a folder of shards, without what is wrapped around them."""
    return read_wrapped(*split_entry(source))[0]


def _read_file(source: Path) -> dict[str, Any]:
    """Read what a file or a folder of shards holds, wrappers and all."""
    if source.is_dir():
        return _read_shards(source)
    if not source.is_file():
        raise ValueError(f"there is no file {source}; copy or download it")
    head = check_kind(source)
    if source.suffix == ".safetensors" or head[8:9] == b"{":
        return dict(read_safetensors(source))
    mapped = head.startswith(b"PK")
    if mapped and not zipfile.is_zipfile(source):
        raise ValueError(_damaged(source))
    try:
        # What was saved before torch 1.6 is no zip file and cannot be mapped.
        tree = torch.load(source, map_location="cpu", mmap=mapped or None, weights_only=True)
    except Exception as error:  # whatever the bytes lead the unpickler to
        if not any(word in str(error) for word in ("GLOBAL", "Unsupported class")):
            raise ValueError(_damaged(source)) from error
        raise ValueError(
            f"{source} holds more than tensors, and what else it holds could run code; it is not "
            "read: ask its author for safetensors"
        ) from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source} holds a {type(tree).__name__}, not named tensors; use another")
    return dict(tree)


def _read_shards(folder: Path) -> Weights:
    """Read what diffusers chooses of a folder: safetensors before pickles, plain before variants.

    That is the file, or the files of an index; `model.fp16.safetensors` is a variant of `model`.
    """
    kind = next((k for k in WEIGHT_FILES if any(folder.glob(f"{k}*"))), WEIGHT_FILES[0])
    indices = sorted(folder.glob(f"{kind}.index*.json"), key=lambda path: len(path.name))
    found = sorted(folder.glob(kind))
    stems = [file.stem for file in found]
    files = [f for f in found if not any(f.stem.startswith(f"{stem}.") for stem in stems)]
    if indices and (len(files) != 1 or indices[0].name.endswith(".index.json")):
        placed = read_json(indices[0]).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{indices[0]} names no files; copy or download it again")
        files = [folder / name for name in sorted(set(placed.values()))]
    if not files or (len(files) > 1 and not indices):
        raise ValueError(
            f"{folder} has {len(files)} files {kind} and no index that says which belong "
            "together; pass one file, or a folder of one model"
        )
    if lost := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(lost)} of {len(files)} shards ({', '.join(lost)}); "
            "copy or download them"
        )
    return {key: tensor for file in files for key, tensor in _read_file(file).items()}


def read_wrapped(file: Path, entry: str | None = None) -> tuple[Weights, list[str]]:
    """Read tensors, from one entry or the usual one; also return the names of what is around."""
    tree, path = _read_file(file), []
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
    if extra := [key for key in tensors if NO_WEIGHTS.search(key)]:
        said = f"{file}: left out are tensors that are no weights{_list(extra)}"
        warnings.warn(Note(said), stacklevel=2)
    weights = {key: tensor for key, tensor in tensors.items() if not NO_WEIGHTS.search(key)}
    return _unscaled(weights, file), path


def _unscaled(weights: Weights, file: Path) -> Weights:
    """Multiply weights by the scales beside them, as ComfyUI has them; float8 becomes bfloat16."""
    scales = {match[1]: key for key in weights if (match := SCALE.match(key))}
    plain = {key: tensor for key, tensor in weights.items() if not SCALE.match(key)}
    for layer, key in scales.items():
        weight, scale = plain.get(f"{layer}.weight"), weights[key].float().flatten()
        if weight is None or not weight.is_floating_point() or len(scale) not in (1, len(weight)):
            raise ValueError(
                f"{file} is quantised: {key!r} is no scale of a float8 matrix or of its rows, which"
                " alone are read; use the file in bfloat16, float16 or float8"
            )
        exact = weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
        dtype = torch.bfloat16 if weight.itemsize == 1 else weight.dtype
        plain[f"{layer}.weight"] = exact.to(dtype)
    if scales:
        said = f"{file}: {len(scales)} matrices are scaled float8, and read as bfloat16"
        warnings.warn(Note(said), stacklevel=2)
    return plain


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return a precision that models can run in; None stays None."""
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if name is not None and dtype is None:
        raise ValueError(f"a model cannot run in {name}: choose the dtype {', '.join(DTYPES)}")
    return dtype


LARGEST_JOINED = 2**20  # values of matrices that are copied to be fast; larger ones are fast


def side_by_side(*layers: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of layers side by side: what wraps or hooks them takes part."""
    return layers[0] if len(layers) == 1 else lambda x: torch.cat([f(x) for f in layers], dim=-1)


def as_one(*layers: Any) -> Callable[[Tensor], Tensor]:
    """Return the same function as one product, where nothing wraps small layers or hooks in.

    The matrices are copied, and lie as a product of few rows reads them: a fifth of a pass.
    """
    size = sum(weight.numel() for layer in layers for weight in layer.parameters())
    wrapped = any(type(each) is not nn.Linear or each._forward_pre_hooks for each in layers)
    if wrapped or size > LARGEST_JOINED:
        return side_by_side(*layers)
    weight = torch.cat([layer.weight.t() for layer in layers], dim=1).t()
    bias = torch.cat([layer.bias for layer in layers])
    return partial(F.linear, weight=weight, bias=bias)


def offload(model: nn.Module, blocks: nn.Module, device: Device) -> None:
    """Keep the matrices of `blocks` on the host; each visits `device` while it is used.

    A pass then waits for its weights, but the device holds one of them at a time.
    """
    inside = [part for part in blocks.modules() if isinstance(part, nn.Linear)]
    host = {id(part): dict(part.named_parameters()) for part in inside}
    for part in set(model.modules()) - set(inside):
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(parameter.data.to(device))

    def visit(layer: nn.Module, _: Any) -> None:
        for name, parameter in host[id(layer)].items():
            layer._parameters[name] = nn.Parameter(parameter.to(device, non_blocking=True))

    def leave(layer: nn.Module, *_: Any) -> None:
        layer._parameters.update(host[id(layer)])

    for layer in inside:
        layer.register_forward_pre_hook(visit)
        layer.register_forward_hook(leave)


def part_of(state: Mapping[str, Tensor], name: str, *, device: Device) -> Weights:
    """Return what a state keeps under `name.`, on a device and in its own dtype."""
    kept = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
    return {key.removeprefix(f"{name}."): value.to(device) for key, value in kept.items()}
