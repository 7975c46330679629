"""Checkpoints of every format: their parts, loaded for a pipeline or written in another format."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from videoar import interop, umt5, wan
from videoar.checkpoint import (
    CONFIG,
    META,
    Component,
    load_component,
    load_meta,
    read_json,
    replaced_folder,
    resolve,
    save_checkpoint,
    save_weights,
)
from videoar.codecs import Codec, PatchCodec, PatchCodecConfig, TinyCodec, TinyCodecConfig
from videoar.interop import Found
from videoar.text import PromptEncoder, Prompts
from videoar.weights import split_entry

Format = Literal["videoar", "diffusers", "wan"]
CODECS = {
    "TinyCodec": (TinyCodec, TinyCodecConfig),
    "PatchCodec": (PatchCodec, PatchCodecConfig),
    "WanCodec": (wan.WanCodec, wan.WanCodecConfig),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Origin:
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
    ) -> "Origin":
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
        """Return how it is sampled by default: fields of `Sampling`, with height and width."""
        meta = self.meta
        if preset is not None or not meta:
            return wan.sampling(self.home, preset)
        size = {"height": meta.get("height", 64), "width": meta.get("width", 64)}
        stated = size | meta.get("sampling", {})
        if stated.get("sigmas"):  # a list in JSON
            stated["sigmas"] = tuple(stated["sigmas"])
        return stated

    def check_preset(self, found: Found, preset: str | None) -> None:
        """Raise if weights alone, which may be of any family, would be sampled like plain Wan."""
        alone = self.lora is not None or not found.file.is_dir()
        if preset is None and alone and not self.meta:
            raise ValueError(
                f"{self.source} ({found.format}) does not say how it is sampled: name its --preset,"
                f" one of {', '.join(wan.PRESETS)}"
            )

    def transformer(self) -> Found:
        """Read the transformer; its weights are mapped and not yet in memory."""
        head_dim = interop.stated_head_dim(self.home)
        return interop.read_transformer(self.source, lora=self.lora, head_dim=head_dim)


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return a precision that models can run in; None stays None."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"a model cannot run in {name}: choose the dtype {known}")
    return dtype


def check_device(device: str) -> None:
    """Raise unless tensors can be made on a device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}); use another one, such as cpu"
        ) from error


def load_codec(source: Path, *, device: torch.device | str = "cpu") -> Codec:
    """Load the codec of a checkpoint of any format, or a file of one."""
    if (source / "codec" / CONFIG).is_file():
        return load_component(source / "codec", CODECS, device=device).eval()
    return wan.load_codec(source, device=device).eval()


def load_prompts(
    source: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Prompts:
    """Load the text side of a checkpoint of any format."""
    if (source / "text" / CONFIG).is_file():
        return PromptEncoder.load(source / "text", device=device)
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


def convert(
    origin: Origin,
    target: Path,
    *,
    format: Format,
    preset: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a checkpoint in another format; without `dtype` every tensor keeps its bits.

    Where there is no codec or text encoder, the target has none either.

    Returns:
        What was written, in sentences.
    """
    found = origin.transformer()
    if dtype is not None:
        found = replace(found, weights=dict(found.build(dtype=as_dtype(dtype)).state_dict()))
    parts = {} if format == "wan" else surroundings(origin.home)
    if format == "videoar":
        origin.check_preset(found, preset)
    sampling = origin.sampling(preset)
    report = [f"{found.file}: {found.format}, {len(found.weights)} tensors, {found.dtype}"]
    if format == "videoar":
        transformer = Component(module=found.build(), config=found.config)
        components: dict[str, Any] = {"transformer": transformer}
        if "codec" in parts:
            components["codec"] = Component(module=parts["codec"], config=parts["codec"].config)
        if "text" in parts:
            components["text"] = parts["text"].save
        meta = {**origin.meta, "origin": found.format, "sampling": sampling}
        save_checkpoint(target, components, meta, overwrite=overwrite)
    elif format == "diffusers":
        with replaced_folder(target, marker="model_index.json", overwrite=overwrite) as folder:
            _write_diffusers(folder, found, parts, shift=sampling["shift"], home=origin.home)
    else:
        with replaced_folder(target, marker=CONFIG, overwrite=overwrite) as folder:
            interop.save_wan(folder, found)
    names = ", ".join(["transformer", *parts])
    return [*report, f"{target}: {format}, {names}; every tensor was matched"]


def _write_diffusers(
    folder: Path, found: Found, parts: Mapping[str, Any], *, shift: float, home: Path
) -> None:
    """Write a folder that diffusers' `WanPipeline` loads, as far as there are its parts."""
    interop.save_diffusers(folder / "transformer", found)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    scheduler = {"_class_name": index["scheduler"][1], "num_train_timesteps": 1000, "shift": shift}
    codec, text = parts.get("codec"), parts.get("text")
    for part, kind in ((codec, wan.WanCodec), (text, umt5.UMT5PromptEncoder)):
        if part is not None and not isinstance(part, kind):
            raise ValueError(
                f"{home} has a {type(part).__name__}, which diffusers does not know; write it with "
                "--format videoar"
            )
    if isinstance(codec, wan.WanCodec):
        index["vae"] = ["diffusers", "AutoencoderKLWan"]
        stated = {"_class_name": "AutoencoderKLWan", **asdict(codec.config)}
        save_weights(folder / "vae" / interop.FILE, codec.vae.state_dict(), stated)
    if isinstance(text, umt5.UMT5PromptEncoder):
        text.save(folder, encoder="text_encoder")
        index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
        stated = read_json(text.tokenizer / "tokenizer_config.json")
        index["tokenizer"] = ["transformers", stated.get("tokenizer_class", "T5TokenizerFast")]
    written: dict[str, dict[str, Any]] = {"model_index.json": index}
    if (stated := home / "model_index.json").is_file():  # of the same kind: as it is there
        shutil.copytree(home / "scheduler", folder / "scheduler")
        index |= {key: read_json(stated)[key] for key in ("tokenizer", "scheduler")}
    else:
        (folder / "scheduler").mkdir()
        written["scheduler/scheduler_config.json"] = scheduler
    for name, values in written.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
