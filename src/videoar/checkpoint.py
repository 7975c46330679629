"""Checkpoints of this project: folders of safetensors and JSON, written whole and loaded strictly.

A checkpoint is a folder::

    videoar.json         what it is: format, versions, and whatever the writer knows of the run
    transformer/         one folder per component
        config.json      the class name and the fields of its config
        model.safetensors
        ...              further text files, such as a tokenizer

Foreign formats are read elsewhere. Nothing here knows which components there are.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from videoar import __version__

FORMAT = 1
META = "videoar.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
AGAIN = "copy or download the checkpoint again"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a checkpoint; call it to write it into a folder."""

    module: nn.Module
    """Its state dict is what is saved."""
    config: Any
    """A frozen dataclass from which the module can be built again."""
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of further files and their text, such as `tokenizer.json`."""

    def __call__(self, folder: Path) -> None:
        fields = {"class": type(self.module).__name__, **dataclasses.asdict(self.config)}
        save_weights(folder / WEIGHTS, self.module.state_dict(), fields)
        for name, content in self.texts.items():
            (folder / name).write_text(content, encoding="utf-8")


def save_weights(file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors, which must not share memory, and their `config.json` beside them."""
    # Serialise first: a config that is no JSON must not leave half a component.
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    # Loaded tensors are a view of their file, so a file is replaced and never written over.
    partial = file.with_name(f"{file.name}.partial")
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)
    (file.parent / CONFIG).write_text(text, encoding="utf-8")


def load_component(
    folder: Path,
    classes: Mapping[str, tuple[type[ModuleT], type]],
    *,
    device: torch.device | str = "cpu",
) -> ModuleT:
    """Build what a `Component` wrote, with the weights in the precision they have there.

    `classes` gives the module class and its config class for each class name that may occur.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; copy or download the folder again")
    values = read_json(config)
    name = values.pop("class", None)
    if name not in classes:
        known = ", ".join(sorted(classes))
        raise ValueError(f"{config} names class {name!r}; only {known} fits here")
    module_class, config_class = classes[name]
    module = build_empty(module_class, build_config(config_class, values, file=config))
    assign_weights(module, read_safetensors(weights, device=device), file=weights)
    return module


def read_safetensors(file: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a file; on the CPU its tensors are views of the mapped file and cost no memory."""
    try:
        return load_file(file, device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated or damaged "
            f"({error}); copy or download it again"
        ) from error


def build_empty(module_class: Callable[[Any], ModuleT], config: Any) -> ModuleT:
    """Build a module on the meta device: no memory is spent on values that weights replace."""
    with torch.device("meta"), _NoInitialValues():
        return module_class(config)


def assign_weights(module: nn.Module, weights: dict[str, Tensor], *, file: Path) -> None:
    """Make tensors those of a module, strictly and without a copy.

    Raises:
        ValueError: in one sentence, which are missing, unexpected or wrongly shaped.
    """
    wanted, kind = module.state_dict(), type(module).__name__
    remedy = "configuration and weights must come from the same checkpoint"
    wrong = []
    if missing := [key for key in wanted if key not in weights]:
        wrong.append(f"lacks {len(missing)} of the {len(wanted)} tensors of {kind}{_list(missing)}")
    if unexpected := [key for key in weights if key not in wanted]:
        wrong.append(f"has {len(unexpected)} that {kind} does not know{_list(unexpected)}")
    if wrong:
        raise ValueError(f"{file} {' and '.join(wrong)}; {remedy}")
    for key, tensor in wanted.items():
        needed, shape = tuple(tensor.shape), tuple(weights[key].shape)
        if shape != needed:
            raise ValueError(
                f"{file} holds {key!r} in shape {shape}, but {kind} needs {needed}; {remedy}"
            )
    module.load_state_dict(weights, strict=True, assign=True)
    for buffer, tensor in module.named_buffers():
        assert not tensor.is_meta, f"buffer {buffer} is not saved: compute it in forward"


class _NoInitialValues(TorchFunctionMode):
    """Skip `torch.nn.init`: on meta tensors it imports the compiler, 1.5 s of every start."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        draws = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if draws or getattr(func, "__module__", "") == "torch.nn.init":
            return values["tensor"] if "tensor" in values else args[0]
        return func(*args, **values)


def save_checkpoint(
    folder: Path,
    components: Mapping[str, Callable[[Path], None]],
    meta: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder that is complete the moment it appears under its name.

    Each component writes into a sub-folder of its name; `meta` goes into `videoar.json`.
    `overwrite` replaces a checkpoint of this name; nothing but a checkpoint is ever replaced.
    """
    own = {"format": FORMAT, "components": sorted(components)}
    versions = {"videoar": __version__, "python": platform.python_version()}
    for library in ("torch", "numpy", "safetensors", "tokenizers"):
        versions[library] = importlib.metadata.version(library)
    # The writer's versions win: a checkpoint saved again keeps those it was trained with.
    text = json.dumps({**own, "versions": versions, **meta, **own}, indent=2) + "\n"
    with replaced_folder(folder, marker=META, overwrite=overwrite) as partial:
        for name, component in components.items():
            component(partial / name)
        (partial / META).write_text(text, encoding="utf-8")
    return folder


@contextlib.contextmanager
def replaced_folder(folder: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that takes the name `folder` when all is written, and vanishes if not.

    Raises:
        ValueError: the folder exists and has no file `marker`, or is not to be overwritten.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} is no checkpoint, so it is left alone; choose another")
        if not overwrite:
            raise ValueError(f"{folder} exists already; choose another folder or pass --force")
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load_meta(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself."""
    file = folder / META
    if not file.is_file():
        raise ValueError(f"{folder} has no {META}, so it is no checkpoint; pass one that has it")
    meta = read_json(file)
    version = meta.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{file} gives format {version!r}, not an integer from 1 to {FORMAT}; {AGAIN}"
        )
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, but VideoAR {__version__} reads formats up to {FORMAT}; "
            "update it with `pip install --upgrade videoar`"
        )
    return meta


def bundled() -> list[str]:
    """Return the names of the checkpoints that come with the package."""
    assets = _assets()
    return sorted(path.parent.name for path in assets.glob(f"*/{META}"))


def resolve(name_or_path: str | Path) -> Path:
    """Find a checkpoint: what is there, else a bundled one, else a Hugging Face repository."""
    name = str(name_or_path)
    if (path := Path(name).expanduser()).exists():
        return path
    names = bundled()
    if name in names:
        return _assets() / name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix.startswith((".pt", ".safe")):
        return _from_hub(name)
    known = f"bundled: {', '.join(names)}" if names else "none is bundled"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}" if close else f"pass a folder that holds {META}, or a file"
    raise ValueError(f"no checkpoint is called {name!r} ({known}); {hint}")


def _from_hub(name: str) -> Path:
    """Return the snapshot of a Hugging Face repository, downloaded if it is not there yet."""
    import huggingface_hub  # takes seconds

    try:
        try:
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return Path(huggingface_hub.snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"there is no folder {name!r}, and the Hugging Face repository of that name is not in "
            f"the local cache and cannot be downloaded ({reason}); where there is a network, run "
            f"`hf download {name} --local-dir {name.split('/')[1]}` and pass that folder"
        ) from error


def _assets() -> Path:
    return Path(str(files("videoar").joinpath("assets")))


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{file} is not JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not an object; {AGAIN}")
    return values


def build_config(config_class: type, values: dict[str, Any], *, file: Path) -> Any:
    """Build a config, nested ones included, from what JSON made of it."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(
            f"{file} has a field {unknown[0]!r}, but {config_class.__name__} knows only "
            f"{', '.join(fields)}; remove it or update VideoAR"
        )
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(
                f"{file} lacks the field {name!r}, which {config_class.__name__} needs; {AGAIN}"
            )
    hints = typing.get_type_hints(config_class)
    given = {k: _from_json(value, hints[k], name=k, file=file) for k, value in values.items()}
    try:
        return config_class(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not make a {config_class.__name__}: {error}") from error


def _from_json(value: Any, hint: Any, *, name: str, file: Path) -> Any:
    """Give a JSON value the type of its field; lists become tuples, as frozen configs hold."""
    if isinstance(value, dict):
        for choice in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(choice) and isinstance(choice, type):
                return build_config(choice, value, file=file)
    if isinstance(value, list):
        return tuple(_from_json(item, None, name=name, file=file) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ValueError(
            f"{file} gives {name} the value {value!r} where {hint.__name__} is needed; correct it"
        )
    return value


def _list(keys: list[str]) -> str:
    """Write keys in brackets, those of several layers as one."""
    alike: dict[str, list[str]] = {}
    for key in keys:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", key, count=1), []).append(key)
    counted = [f"{name!r} x {len(k)}" if k[1:] else repr(k[0]) for name, k in alike.items()]
    return f" ({', '.join(counted)})"


def library(name: str) -> Any:
    """Import what the extra `wan` installs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Wan's codec and text encoder need {name.partition('.')[0]} ({error}); "
            "run `pip install 'videoar[wan]'`"
        ) from error
