"""Checkpoints of the Wan family, whatever their names, and how each family is sampled.

Everything becomes a dictionary of tensors under our names, which are those of diffusers.
"""

import math
import re
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from videoar.checks import Note, check
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.encoders.wan_codec import WanCodec, WanCodecConfig
from videoar.files import Json
from videoar.weights import (
    CONFIG,
    META,
    WEIGHT_FILES,
    Weights,
    assign_weights,
    build_config,
    build_empty,
    library,
    read_json,
    read_weights,
    read_wrapped,
    split_entry,
)

FILE = "diffusion_pytorch_model.safetensors"
# Put before and between names by FSDP, activation checkpointing, torch.compile and DDP.
INFIXES = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
PREFIXES = re.compile(r"^(?:(?:base_model|model|net_ema|net|diffusion_model|transformer)\.)+")
# Original names and ours, of the model and of a block. The norms 2 and 3 change places.
TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
ATTENTION |= {"norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    "modulation": "scale_shift_table",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{theirs}.{part}": f"{ours}.{new}"
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, new in ATTENTION.items()
}
# These stay in float32 when the rest is narrower, as in diffusers and in the original.
KEEP = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
# diffusers' config.json, by the fields of ours. What else it holds must have these values.
FIELDS = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "latent_channels",
} | {name: name for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "eps")}
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
CODEC_FIXED = {"is_residual": False, "patch_size": None}


# What else is published beside transformers, by a part of its names.
OTHERS = {
    "lora_": "holds low-rank updates: pass it as lora, beside the file of its base model",
    "decoder.": "holds a codec: pass it as codec, beside a transformer",
    "img_emb": "needs a picture beside the text, which cannot be run: use text-to-video of Wan 2.1",
}


@dataclass(frozen=True)
class TransformerWeights:
    """A transformer as it lies on disk."""

    weights: Weights
    """In our names; mapped, so not yet in memory."""
    config: ModelConfig
    file: Path
    format: str
    """What it was, in words."""

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["proj_out.weight"].dtype

    def build(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> VideoTransformer:
        """Build the model; without `dtype` the tensors keep their bits."""
        placed = {}
        for name, tensor in self.weights.items():
            wide = dtype is not None and KEEP & set(name.split("."))
            placed[name] = tensor.to(device, torch.float32 if wide else dtype)
        return assign_weights(build_empty(VideoTransformer, self.config), placed, file=self.file)


def read_transformer(source: Path, *, base: Path) -> TransformerWeights:
    """Read a transformer under other names: a folder or a file, whatever is wrapped around it.

    Weights do not show the size of the heads: a config beside them does, or else that of `base`.
    """
    source, entry = split_entry(source)
    if source.is_dir() and not any(any(source.glob(k)) for k in ("*.json", *WEIGHT_FILES)):
        raise ValueError(
            f"{source} has no {META}, no model_index.json and no weights, so it is no checkpoint; "
            "pass one that has them"
        )
    if (source / "transformer_2").is_dir():
        raise ValueError(
            f"{source} has a second transformer, as Wan 2.2 has for high noise, and only one can "
            "be run; use a model of Wan 2.1"
        )
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    stated = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    weights, wrappers = read_wrapped(folder, entry)
    for part, says in OTHERS.items():
        if any(part in key for key in weights):
            raise ValueError(f"{folder} {says}")
    weights, names = our_names(weights)
    config = _config_of(weights, stated, base, file=folder)
    if "scale_embedding.weight" not in weights:  # ours alone; zero changes nothing
        like = next(iter(weights.values()))
        weights["scale_embedding.weight"] = like.new_zeros(config.num_levels, config.hidden_size)
    entries = "".join(f", entry {name}" for name in wrappers)
    words = f"{names} names{entries}, {'folder' if folder.is_dir() else 'file'}"
    assign_weights(build_empty(VideoTransformer, config), weights, file=folder)  # none is missing
    return TransformerWeights(weights, config, folder, words)


def our_names(weights: Weights) -> tuple[Weights, str]:
    """Rename the tensors of any family; say which names they had."""
    bare = {INFIXES.sub("", key): tensor for key, tensor in weights.items()}
    averaged = {key: tensor for key, tensor in bare.items() if key.startswith("net_ema.")}
    bare = {PREFIXES.sub("", key): tensor for key, tensor in (averaged or bare).items()}
    patch = bare.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2:  # rCM; Wan's patches have 1 x 2 x 2 latent pixels
        bare["patch_embedding.weight"] = patch.unflatten(1, (-1, 1, 2, 2))
    if not any(".self_attn." in key for key in bare):
        return bare, "diffusers"
    return renamed(bare, TOP, BLOCK), "original Wan"


def wan_names(weights: Weights) -> Weights:
    """Rename from ours to the original's; the inverse of `our_names`."""
    top, block = ({new: old for old, new in table.items()} for table in (TOP, BLOCK))
    return renamed(weights, top, block)


def renamed(weights: Weights, top: dict[str, str], block: dict[str, str]) -> Weights:
    """Give tensors other names: by one table those of a block, by another the rest."""
    renamed = {}
    for key, tensor in weights.items():
        match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", key)
        assert match is not None
        prefix, stem, suffix = (part or "" for part in match.groups())
        renamed[prefix + (block if prefix else top).get(stem, stem) + suffix] = tensor
    return renamed


def _config_of(weights: Weights, stated: Json, base: Path, *, file: Path) -> ModelConfig:
    """Read sizes from the config if there is one, and from the shapes of the weights if not."""
    if "num_attention_heads" in stated:
        patch = stated.get("patch_size", [1, 2, 2])
        square = [1, *2 * (patch[1:2] or [2])] if isinstance(patch, list) else [1, 2, 2]
        known, fixed = {**stated, "patch": square[1]}, FIXED | {"patch_size": square}
        return _stated(ModelConfig, known, {**FIELDS, "patch": "patch"}, fixed, file / CONFIG)
    places = (base / "transformer" / CONFIG, base / CONFIG)
    theirs = next((read_json(place) for place in places if place.is_file()), {})
    head_dim = _head_dim(stated) or _head_dim(theirs) or 128
    if (bias := weights.get("patch_embedding.bias")) is not None and len(bias) % head_dim:
        raise ValueError(
            f"{file} has {len(bias)} channels, which are no whole number of heads of {head_dim}; "
            "pass the folder of its base model, whose config states the heads, as base"
        )
    try:
        size, channels, _, patch, _ = weights["patch_embedding.weight"].shape
        embedder = "condition_embedder.{}_embedder.linear_1.weight"
        return ModelConfig(
            latent_channels=channels,
            patch=patch,
            num_layers=len({k.split(".")[1] for k in weights if k.startswith("blocks.")}),
            num_heads=max(1, size // head_dim),
            head_dim=head_dim,
            ffn_dim=len(weights["blocks.0.ffn.net.0.proj.weight"]),
            text_dim=weights[embedder.format("text")].shape[1],
            freq_dim=weights[embedder.format("time")].shape[1],
        )
    except (KeyError, ValueError):  # no transformer of Wan: the lists of names will say so
        return ModelConfig()


def _stated(kind: type, stated: Json, names: dict[str, str], fixed: Json, file: Path) -> Any:
    """Build a config of what diffusers states: fields by its names, and values we take for granted.

    What it does not state is as by default.
    """
    for name, value in fixed.items():
        if stated.get(name, value) != value:
            raise ValueError(
                f"{file} gives {name} {stated[name]!r}, as Wan 2.2 or others have it, but only "
                f"{value!r} can be run; use a text-to-video model of Wan 2.1, or its codec"
            )
    values = {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    return build_config(kind, values, file=file)


def _head_dim(stated: Json) -> int | None:
    if "dim" in stated and "num_heads" in stated:
        return stated["dim"] // stated["num_heads"]
    return stated.get("attention_head_dim", stated.get("head_dim"))


# Where the codec lies: in a folder of diffusers, of the original.
CODECS = ("vae", "*VAE*.pth")
_ALL = {"height": 480, "width": 832, "fps": 16, "sink_frames": 0}
_WHOLE = {"units": "full", "window_frames": None}
_FEW = _ALL | {
    "units": "chunk:3",
    "num_inference_steps": 4,
    "shift": 5.0,
    "step": "renoise",
    "guidance_scale": 1.0,
    "context_noise": 0.0,
    "window_frames": 21,
}
# How each family was trained to be sampled: fields of `GenerationConfig`.
PRESETS: dict[str, dict[str, Any]] = {
    "wan": _ALL | _WHOLE | {"num_inference_steps": 50, "shift": 3.0, "guidance_scale": 5.0},
    "self-forcing": _FEW,
    # The timesteps 1000, 757 and 522 of its configuration, from a grid of shift 8.
    "causvid": _FEW | {"num_inference_steps": 3, "shift": 8.0, "sigmas": (1.0, 0.757, 0.522, 0.0)},
    "longlive": _FEW | {"window_frames": 12, "sink_frames": 3, "moving_sinks": False},
    "causal-forcing": _FEW,
    "causal-forcing-frame": _FEW | {"units": "frame"},
    # sin t / (sin t + cos t) of its angles 1.5, 1.4 and 1; it begins at sigma_max 80, so at 0.988.
    "rcm": _FEW | _WHOLE | {"sigmas": (1.0, 0.933781, 0.852895, 0.608979, 0.0)},
}


# Schedulers of diffusers: our step, the field of the shift, and what else they must state.
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": ("flow-match-euler", "shift", {}),
    "UniPCMultistepScheduler": ("unipc", "flow_shift", FLOW),
}
# What they may state of the rest: what is so by default, and nothing that is off.
SOLVER: dict[str, Any] = {"num_train_timesteps": 1000, "solver_order": 2, "solver_type": "bh2"}
SOLVER |= {"predict_x0": True, "lower_order_final": True, "final_sigmas_type": "zero"}
SOLVER |= dict.fromkeys(
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_dynamic_shifting shift_terminal"
    " invert_sigmas stochastic_sampling thresholding disable_corrector solver_p".split()
)


def sampling(folder: Path, preset: str | None) -> dict[str, Any]:
    """Return how a family is sampled, or else plain Wan as the scheduler of a folder says."""
    file = folder / "scheduler" / "scheduler_config.json"
    if preset is not None or not file.is_file():
        preset = preset or "wan"
        check("preset", preset, preset in PRESETS, f"one of {', '.join(PRESETS)}")
        return dict(PRESETS[preset])
    stated = read_json(file)
    unknown = "euler", "shift", {"_class_name": ""}
    step, name, needed = SCHEDULERS.get(str(stated.get("_class_name")), unknown)
    shift = stated.get(name, stated.get("flow_shift", 1.0))
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"{file} gives {name} {shift!r}, not a number above 0; correct it")
    for key, value in (SOLVER | needed).items():
        if (stated.get(key, SOLVER.get(key)) or None) != value:
            said = f"{file} gives {key} {stated.get(key)!r}, which is not run:"
            warnings.warn(Note(f"{said} Euler steps of shift {shift:g} are taken"), stacklevel=2)
            step = "euler"
    return PRESETS["wan"] | {"shift": float(shift), "step": step}


def scheduler_of(sampling: Json) -> dict[str, Any]:
    """Return the config of the scheduler of diffusers that samples so, or nearly."""
    ours = {step: (kind, name, needed) for kind, (step, name, needed) in SCHEDULERS.items()}
    kind, name, needed = ours.get(sampling.get("step", ""), ours["flow-match-euler"])
    return {"_class_name": kind, name: sampling["shift"], "num_train_timesteps": 1000, **needed}


def read_codec(source: Path, *, device: torch.device | str = "cpu") -> TinyCodec | WanCodec:
    """Read a codec: a Wan folder, or a file of the original or of TAEHV (`taew2_1`)."""
    if source.is_dir():
        found = next((path for place in CODECS for path in sorted(source.glob(place))), None)
        if found is None:
            raise ValueError(
                f"{source} has no codec; pass a Wan folder with `vae/` or `Wan2.1_VAE.pth` as "
                "base, or a codec"
            )
        source = found
    weights = {key: tensor.to(device) for key, tensor in read_weights(source).items()}
    if "decoder.22.weight" in weights:
        return assign_weights(build_empty(TinyCodec, TinyCodecConfig()), weights, file=source)
    stated = read_json(source / CONFIG) if source.is_dir() else {}
    names = {field.name: field.name for field in fields(WanCodecConfig)}
    config = _stated(WanCodecConfig, stated, names, CODEC_FIXED, source / CONFIG)
    if {"encoder.conv1.weight", "conv2.weight"} <= weights.keys():  # names of the original
        dim, channels = len(weights["encoder.conv1.weight"]), len(weights["conv2.weight"])
        config = replace(config, base_dim=dim, z_dim=channels)
        names = library("diffusers.loaders.single_file_utils")
        weights = names.convert_wan_vae_to_diffusers(weights)
    named = {f"vae.{key}": tensor for key, tensor in weights.items()}
    return assign_weights(build_empty(WanCodec, config), named, file=source)
