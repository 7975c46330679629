"""Checkpoints: found, loaded and written, of every format.

A checkpoint of this project is a folder::

    videoar.json         what it is: format, versions, and whatever the writer knows of the run
    transformer/         one folder per component
        config.json      the class name and the fields of its config
        model.safetensors
        ...              further text files, such as a tokenizer

It is written whole and loaded strictly. What it shares with another checkpoint need not be there
twice: `"parts": {"codec": "toy-base"}` in `videoar.json` says whose it is.
"""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from videoar import __version__, weights
from videoar.checkpoints import wan
from videoar.checkpoints.lora import merge_lora, split_strength
from videoar.checks import checked, explained, hint, typed
from videoar.core.transformer import VideoTransformer
from videoar.encoders import umt5
from videoar.encoders.codec import Codec, PatchCodec
from videoar.encoders.text_encoder import PromptEncoder, TinyPromptEncoder
from videoar.encoders.tiny_codec import TinyCodec
from videoar.encoders.wan_codec import WanCodec
from videoar.files import contents, replaced_folder, write_json
from videoar.weights import AGAIN, CONFIG, META, Device

FORMAT = 1
# Where these parts lie: in a folder of ours, of diffusers, of the original.
PARTS = {"text": ("text", *umt5.TEXTS), "codec": ("codec", *wan.CODECS)}


def save_checkpoint(
    folder: Path,
    parts: Mapping[str, nn.Module | PromptEncoder],
    meta: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder that is complete the moment it appears under its name.

    Each part has a sub-folder of its name; `meta` goes into `videoar.json`. `overwrite` replaces a
    checkpoint of this name; nothing but a checkpoint is ever replaced.
    """
    own = {"format": FORMAT, "components": sorted(parts)}
    versions = {"videoar": __version__, "python": platform.python_version()}
    for library in ("torch", "numpy", "safetensors", "tokenizers"):
        versions[library] = importlib.metadata.version(library)
    # The writer's versions win: a checkpoint saved again keeps those it was trained with.
    about = {**own, "versions": versions, **meta, **own}
    about.pop("parts", None)  # of the checkpoint that was loaded: this one is whole
    with replaced_folder(folder, marker=META, overwrite=overwrite) as partial:
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                weights.save_component(partial / name, part)
            else:
                part.save(partial / name)
        write_json(partial / META, about)
    return folder


class _Meta(TypedDict):
    """What is read of `videoar.json` later, if it is there."""

    components: list[str]
    sampling: dict[str, Any]
    units: list[str]
    words: list[str]
    prompts: list[str]
    height: int
    width: int
    dtype: str
    config: dict[str, Any]
    versions: dict[str, Any]
    seconds: float
    loss_curve: list[tuple[int, float]]


def _read_meta(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint of ours says of itself; nothing if it is another's."""
    file = folder / META
    if not file.is_file():
        return {}
    meta = weights.read_json(file)
    version, parts = meta.get("format"), meta.get("parts", {})
    with explained(f"{file}: {{}}"):
        typed(_Meta, meta)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(
            f"{file} gives format {version!r}, but VideoAR {__version__} reads integers up to "
            f"{FORMAT}; {AGAIN}, or update with `pip install --upgrade videoar`"
        )
    named = isinstance(parts, dict) and all(type(name) is str for name in parts.values())
    if not named or parts.keys() - PARTS.keys():
        raise ValueError(
            f"{file} gives parts {parts!r}, but only {' and '.join(PARTS)} may be those of another "
            "checkpoint, by its name; correct it"
        )
    return meta


def bundled() -> list[str]:
    """Return the names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in assets().glob(f"*/{META}"))


def resolve(name_or_path: str | Path) -> Path:
    """Find a checkpoint: what is there, else a bundled one, else a Hugging Face repository.

    Footage may lie in a folder `robot`, and hides no bundled checkpoint: it holds no model.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    models = (META, "model_index.json", *weights.WEIGHT_FILES)
    hides = path.is_dir() and name in bundled() and not any(map(any, map(path.glob, models)))
    found = path.exists() or weights.split_entry(path)[0].is_file()
    return path if found and not hides else _published(name)


def _published(name: str) -> Path:
    """Find a checkpoint by a name that means the same everywhere."""
    names = bundled()
    if name in names:
        return assets() / name
    file = Path(name).suffix.startswith((".pt", ".safe"))
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not file:
        return _from_hub(name)
    known = f"bundled: {', '.join(names)}" if names else "none is bundled"
    remedy = hint(name, names, "did you mean {!r}") or f"pass a folder that holds {META}, or a file"
    raise ValueError(f"no checkpoint is called {name!r} ({known}); {remedy}")


def _from_hub(name: str) -> Path:
    """Return the snapshot of a Hugging Face repository, downloaded if it is not there yet."""
    import huggingface_hub  # takes seconds

    says = (
        f"there is no folder {name!r}, and the Hugging Face repository of that name is not in the"
        " local cache and cannot be downloaded ({first}); where there is a network, run"
        f" `hf download {name} --local-dir {name.split('/')[1]}` and pass that folder"
    )
    with explained(says, OSError, ValueError):
        try:
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return Path(huggingface_hub.snapshot_download(name))


def assets() -> Path:
    """Return the folder of the checkpoints that come with the package."""
    return Path(__file__).parents[1] / "assets"


def _holds(folder: Path, part: str) -> bool:
    return any(True for place in PARTS[part] for _ in folder.glob(place))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a name stands for: found and read once; parts are loaded when they are asked for."""

    source: Path
    """Transformer, in any format; `FILE#ENTRY` picks an entry of a file."""
    home: Path
    """Codec and text encoder."""
    lora: tuple[tuple[Path, float], ...]
    """Files of low-rank updates to merge, and how strongly."""
    meta: dict[str, Any]
    """What a checkpoint of ours says of itself; empty for another's."""
    named: dict[str, str]
    """Parts that are not at home, and the names of the checkpoints that hold them."""

    @classmethod
    @checked
    def find(
        cls,
        name: str | Path,
        *,
        base: str | Path | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
    ) -> "Checkpoint":
        """Find a bundled checkpoint, a folder, a file, or a Hugging Face repository.

        Args:
            name: `FILE#ENTRY` picks one of the entries that a trainer wrapped.
            base: whose codec and text encoder are taken, and whose config states the size of the
                heads if none is beside the weights.
            lora: file of low-rank updates, or several; `FILE=0.8` scales one.
        """
        source = resolve(name)
        files = [lora] if isinstance(lora, str | Path) else lora or []
        meta, home = _read_meta(source), source if base is None else resolve(base)
        named = (meta if base is None else _read_meta(home)).get("parts", {})
        return cls(
            source=source,
            home=home,
            lora=tuple(map(split_strength, files)),
            meta=meta,
            named={part: name for part, name in named.items() if not _holds(home, part)},
        )

    def _place(self, part: str) -> Path:
        """Return who holds a part: `home`, or the checkpoint that is named there.

        The name means the same wherever the checkpoint lies: the current folder does not matter,
        and a path does not lead out of the checkpoint. There is one step, so there is no circle.
        """
        if part not in self.named:
            return self.home
        name, inside = self.named[part], self.home / self.named[part]
        says = f"{self.home / META} takes its {part} from {name!r}, unless base names another"
        with explained(f"{says}: {{}}"):
            below = inside.is_dir() and inside.resolve().is_relative_to(self.home.resolve())
            folder = inside if below else _published(name)
            _read_meta(folder)
        if not _holds(folder, part):
            raise ValueError(f"{says}: it has none of its own; name one that has it")
        return folder

    def sampling(self, preset: str | None = None) -> dict[str, Any]:
        """Return its defaults: fields of `GenerationConfig`, with height and width."""
        if preset is not None or not self.meta:
            return wan.sampling(self.home, preset)
        size = {side: self.meta.get(side, 64) for side in ("height", "width")}
        return size | self.meta.get("sampling", {})

    def check_preset(self, found: wan.TransformerWeights, preset: str | None) -> None:
        """Raise if weights alone, which may be of any family, would be sampled like plain Wan."""
        alone = bool(self.lora) or not found.file.is_dir()
        if preset is None and alone and not self.meta:
            raise ValueError(
                f"{self.source} ({found.format}) does not say how it is sampled: name its preset,"
                f" one of {', '.join(wan.PRESETS)}"
            )

    def transformer(self) -> wan.TransformerWeights:
        """Read the transformer; its weights are mapped and not yet in memory.

        Raises:
            ValueError: in one sentence, what is missing, damaged, or of another kind.
        """
        if self.meta:
            folder = self.source / "transformer"
            module = weights.load_component(folder, VideoTransformer)
            module.to(weights.as_dtype(self.meta.get("dtype")))  # may be stored in less
            found = wan.TransformerWeights(module.state_dict(), module.config, folder, "videoar")
        else:
            found = wan.read_transformer(self.source, base=self.home)
        for file, strength in self.lora:
            merged = merge_lora(found.weights, file, strength=strength)
            name = file.name if strength == 1 else f"{strength:g} times {file.name}"
            found = replace(found, weights=merged, format=f"{found.format} with {name}")
        return found

    def codec(self, *, dtype: torch.dtype | None = None, device: Device = "cpu") -> Codec:
        """Load the codec, in any format."""
        place, kinds = self._place("codec"), (TinyCodec, PatchCodec, WanCodec)
        if (ours := place / "codec" / CONFIG).is_file():
            # Frames are float32, whatever the weights were stored in.
            codec = weights.load_component(ours.parent, *kinds, device=device).float()
        else:
            codec = wan.read_codec(place, device=device)
        return codec.to(dtype).eval()

    def text_encoder(
        self, *, dtype: torch.dtype | None = None, device: Device = "cpu"
    ) -> PromptEncoder:
        """Load the text side, in any format."""
        place = self._place("text")
        if (place / "text" / CONFIG).is_file():
            return TinyPromptEncoder.load(place / "text", device=device)
        return umt5.UMT5PromptEncoder.find(place, dtype=dtype, device=device)

    def parts(self) -> dict[str, Any]:
        """Load text side and codec, if there are any.

        That they are not there is no error; that they are damaged is one.
        """
        loaders = {"text": self.text_encoder, "codec": self.codec}
        return {p: load() for p, load in loaders.items() if p in self.named or _holds(self.home, p)}

    def fingerprint(self) -> str:
        """Return a hash of all weights and configs: a checkpoint may change under its name.

        Of large files it is that of samples, see `files.contents`.
        """
        source, _ = weights.split_entry(self.source)
        files = source.glob("*/**/*" if self.meta else "**/*") if source.is_dir() else [source]
        found = {file.relative_to(source): file for file in files}
        for part in self.named:
            folder = self._place(part)
            part_folder = folder / part if (folder / part).is_dir() else folder
            for file in part_folder.rglob("*"):
                found[Path(part) / file.relative_to(part_folder)] = file
        digest = hashlib.sha256()
        for name, file in sorted(found.items()):
            # Hidden files are what a download notes down.
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                digest.update(name.as_posix().encode())
                digest.update(contents(file))
        return digest.hexdigest()[:16]


def fingerprints(*names: str | Path | None) -> dict[str, str]:
    """Return the hashes of checkpoints, as far as there are any, by their names."""
    return {str(name): Checkpoint.find(name).fingerprint() for name in names if name is not None}
