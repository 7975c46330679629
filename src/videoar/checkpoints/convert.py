"""Checkpoints written in another format, with every tensor accounted for."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from videoar.checkpoints import wan
from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.checkpoints.wan import FIELDS, FILE, FIXED, TransformerWeights, wan_names
from videoar.core.transformer import ModelConfig
from videoar.encoders import umt5, wan_codec
from videoar.files import Json, replaced_folder, write_json
from videoar.weights import CONFIG, Weights, as_dtype, read_json, save_weights


def plain(found: TransformerWeights) -> Weights:
    """Return what can be written for others.

    Raises:
        ValueError: the model has learnt what only VideoAR can run.
    """
    fields, default = asdict(found.config), asdict(ModelConfig())
    names = ("prediction", "rope_theta")
    own = [f"{name} {fields[name]}" for name in names if fields[name] != default[name]]
    weights = dict(found.weights)
    if weights.pop("scale_embedding.weight").any():
        own.append("a trained scale embedding")
    if own:
        raise ValueError(
            f"{found.file} has {' and '.join(own)}, which no other program runs; write it with "
            "the format videoar"
        )
    return weights


def diffusers_config(config: ModelConfig) -> Json:
    """Return what diffusers builds the transformer of."""
    fields, patch = asdict(config), config.patch
    known = FIXED | {theirs: fields[ours] for theirs, ours in FIELDS.items()}
    return known | {"out_channels": known["in_channels"], "patch_size": [1, patch, patch]}


def save_diffusers(folder: Path, found: TransformerWeights) -> None:
    """Write `transformer/` of a diffusers folder."""
    config = {"_class_name": "WanTransformer3DModel", **diffusers_config(found.config)}
    save_weights(folder / FILE, plain(found), config)


def save_wan(folder: Path, found: TransformerWeights) -> None:
    """Write a folder under the original's names."""
    fields, channels = asdict(found.config), found.config.latent_channels
    same = ("eps", "ffn_dim", "freq_dim", "num_heads", "num_layers")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": found.config.hidden_size}
    config |= {"in_dim": channels, "out_dim": channels, "text_len": 512}
    config |= {name: fields[name] for name in same}
    save_weights(folder / FILE, wan_names(plain(found)), config)


def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    format: Literal["videoar", "diffusers", "wan"],
    preset: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a checkpoint in another format; without `dtype` every tensor keeps its bits.

    Where there is no codec or text encoder, the target has none either.

    Returns:
        What was written, in sentences.

    Raises:
        ValueError: it cannot be written so, or the preset would have no effect.
    """
    kept = format == "diffusers" and (checkpoint.home / "model_index.json").is_file()
    if preset is not None and (format == "wan" or kept):
        holds = "keeps the scheduler of the folder" if kept else "says nothing of how it is sampled"
        raise ValueError(f"preset {preset} has no effect, as the format {format} {holds}: leave it")
    found = checkpoint.transformer()
    if dtype is not None:
        found = replace(found, weights=dict(found.build(dtype=as_dtype(dtype)).state_dict()))
    parts = {} if format == "wan" else checkpoint.parts()
    sampling = checkpoint.sampling(preset)
    report = f"{found.file}: {found.format}, {len(found.weights)} tensors, {found.dtype}"
    if format == "videoar":
        checkpoint.check_preset(found, preset)
        meta = {**checkpoint.meta, "origin": found.format, "sampling": sampling}
        if dtype is not None:
            meta.pop("dtype", None)  # in which it was computed so far
        save_checkpoint(target, {"transformer": found.build(), **parts}, meta, overwrite=overwrite)
    elif format == "diffusers":
        with replaced_folder(target, marker="model_index.json", overwrite=overwrite) as folder:
            _write_diffusers(folder, found, parts, wan.scheduler_of(sampling), checkpoint.home)
    else:
        with replaced_folder(target, marker=CONFIG, overwrite=overwrite) as folder:
            save_wan(folder, found)
    names = ", ".join(["transformer", *parts])
    return [report, f"{target}: {format}, {names}; every tensor was matched"]


def _write_diffusers(
    folder: Path, found: TransformerWeights, parts: Json, scheduler: Json, home: Path
) -> None:
    """Write a folder that diffusers' `WanPipeline` loads, as far as there are its parts."""
    save_diffusers(folder / "transformer", found)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    for part in parts.values():
        if isinstance(part, wan_codec.WanCodec):
            index["vae"] = ["diffusers", "AutoencoderKLWan"]
            stated = {"_class_name": "AutoencoderKLWan", **asdict(part.config)}
            save_weights(folder / "vae" / wan.FILE, part.vae.state_dict(), stated)
        elif isinstance(part, umt5.UMT5PromptEncoder):
            part.save(folder, encoder="text_encoder")
            index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
            stated = read_json(part.tokenizer / "tokenizer_config.json")
            index["tokenizer"] = ["transformers", stated.get("tokenizer_class", "T5TokenizerFast")]
        else:
            raise ValueError(
                f"{home} has a {type(part).__name__}, which diffusers does not know; write it with "
                "the format videoar"
            )
    if (stated := home / "model_index.json").is_file():  # of the same kind: as it is there
        shutil.copytree(home / "scheduler", folder / "scheduler")
        theirs = read_json(stated)
        index |= {key: theirs[key] for key in ("tokenizer", "scheduler") if key in theirs}
    else:
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)
