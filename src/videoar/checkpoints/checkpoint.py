"""Checkpoints: found, loaded and written, of every format.

A checkpoint of this project is a folder::

    videoar.json         what it is: format, versions, and whatever the writer knows of the run
    transformer/         one folder per component
        config.json      the class name and the fields of its config
        model.safetensors
        ...              further text files, such as a tokenizer

It is written whole and loaded strictly.
"""

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from videoar import __version__
from videoar.checkpoints import wan
from videoar.checkpoints.wan import TransformerWeights, merge_lora, read_foreign
from videoar.checks import hint
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.encoders import umt5, wan_codec
from videoar.encoders.codec import Codec, PatchCodec, PatchCodecConfig
from videoar.encoders.text_encoder import PromptEncoder, TinyPromptEncoder
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.files import replaced_folder
from videoar.weights import (
    AGAIN,
    CONFIG,
    META,
    load_component,
    read_json,
    read_weights,
    split_entry,
)

FORMAT = 1


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
    remedy = hint(name, names, "did you mean {!r}") or f"pass a folder that holds {META}, or a file"
    raise ValueError(f"no checkpoint is called {name!r} ({known}); {remedy}")


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


def read_transformer(
    source: Path, *, lora: Path | None = None, head_dim: int | None = None
) -> TransformerWeights:
    """Read a transformer: a folder of ours, of diffusers or of the original, or a single file.

    Args:
        source: where it is; `FILE#ENTRY` picks one of the entries that a trainer wrapped.
        lora: low-rank updates that are merged into it.
        head_dim: of the model, if no config states it: weights do not show it, and Wan has 128.

    Raises:
        ValueError: in one sentence, what is missing, damaged, or of another kind.
    """
    if (source / META).is_file():
        folder = source / "transformer"
        module = load_component(folder, {"VideoTransformer": (VideoTransformer, ModelConfig)})
        found = TransformerWeights(module.state_dict(), module.config, folder, "videoar")
    else:
        found = read_foreign(source, head_dim)
    if lora is not None:
        merged = merge_lora(found.weights, read_weights(lora), file=lora)
        found = replace(found, weights=merged, format=f"{found.format} with {lora.name}")
    return found


CODECS = {
    "TinyCodec": (TinyCodec, TinyCodecConfig),
    "PatchCodec": (PatchCodec, PatchCodecConfig),
    "WanCodec": (wan_codec.WanCodec, wan_codec.WanCodecConfig),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the parts of a model come from."""

    source: Path
    """Transformer, in any format; `FILE#ENTRY` picks an entry of a file."""
    home: Path
    """Codec and text encoder."""
    lora: Path | None = None
    """Low-rank updates to merge."""

    @classmethod
    def find(
        cls, name: str | Path, *, base: str | Path | None = None, lora: str | Path | None = None
    ) -> "Checkpoint":
        """Find a bundled checkpoint, a folder, a file, or a Hugging Face repository."""
        source = Path(name).expanduser()
        found = split_entry(source)[0]
        if not found.is_file():
            source = found = resolve(name)
        home = found if base is None else resolve(base)
        return cls(source=source, home=home, lora=None if lora is None else Path(lora))

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint of ours says of itself."""
        return load_meta(self.source) if (self.source / META).is_file() else {}

    def sampling(self, preset: str | None = None) -> dict[str, Any]:
        """Return its defaults: fields of `GenerationConfig`, with height and width."""
        meta = self.meta
        if preset is not None or not meta:
            return wan.sampling(self.home, preset)
        size = {"height": meta.get("height", 64), "width": meta.get("width", 64)}
        stated = size | meta.get("sampling", {})
        if stated.get("sigmas"):  # a list in JSON
            stated["sigmas"] = tuple(stated["sigmas"])
        return stated

    def check_preset(self, found: TransformerWeights, preset: str | None) -> None:
        """Raise if weights alone, which may be of any family, would be sampled like plain Wan."""
        alone = self.lora is not None or not found.file.is_dir()
        if preset is None and alone and not self.meta:
            raise ValueError(
                f"{self.source} ({found.format}) does not say how it is sampled: name its --preset,"
                f" one of {', '.join(wan.PRESETS)}"
            )

    def transformer(self) -> TransformerWeights:
        """Read the transformer; its weights are mapped and not yet in memory."""
        head_dim = wan.stated_head_dim(self.home)
        return read_transformer(self.source, lora=self.lora, head_dim=head_dim)


def load_codec(source: Path, *, device: torch.device | str = "cpu") -> Codec:
    """Load the codec of a checkpoint of any format, or a file of one."""
    if (source / "codec" / CONFIG).is_file():
        return load_component(source / "codec", CODECS, device=device).eval()
    return wan.load_codec(source, device=device).eval()


def load_prompts(
    source: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PromptEncoder:
    """Load the text side of a checkpoint of any format."""
    if (source / "text" / CONFIG).is_file():
        return TinyPromptEncoder.load(source / "text", device=device)
    return umt5.UMT5PromptEncoder.find(source, dtype=dtype, device=device)


def surroundings(home: Path) -> dict[str, Any]:
    """Load the codec and the text side of a checkpoint, if it has them.

    That they are not there is no error; that they are damaged is one.
    """

    def has(*places: str) -> bool:
        return home.is_dir() and any(True for place in places for _ in home.glob(place))

    parts: dict[str, Any] = {}
    if has("text", *umt5.TEXTS):
        parts["text"] = load_prompts(home)
    if has("codec", *wan.CODECS):
        parts["codec"] = load_codec(home)
    return parts
