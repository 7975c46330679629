"""Transformers of the Wan family, whatever their names: tensors only, no other library.

Everything becomes a dictionary of tensors under our names, which are those of diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videoar.checkpoint import (
    CONFIG,
    META,
    assign_weights,
    build_config,
    build_empty,
    load_component,
    read_json,
    save_weights,
)
from videoar.model import ModelConfig, VideoTransformer
from videoar.weights import Weights, read_file, read_weights, split_entry, unwrap

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
LORA = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.[\w-]+)?\.weight|alpha)")
SIDES = {"down": "A", "up": "B"}
# diffusers' config.json, by the fields of ours. What else it holds must have these values.
FIELDS = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "latent_channels",
} | {name: name for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "eps")}
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}


# What else is published beside transformers, by a part of its names.
OTHERS = {
    "lora_A": "holds low-rank updates: pass it as --lora, beside the file of its base model",
    "decoder.": "holds a codec: pass it as --codec, beside a transformer",
    "img_emb": "needs a picture beside the text, which cannot be run: use text-to-video of Wan 2.1",
}


@dataclass(frozen=True)
class Found:
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
        module, placed = build_empty(VideoTransformer, self.config), {}
        for name, tensor in self.weights.items():
            wide = dtype is not None and KEEP & set(name.split("."))
            placed[name] = tensor.to(device, torch.float32 if wide else dtype)
        assign_weights(module, placed, file=self.file)
        return module


def read_transformer(
    source: Path, *, lora: Path | None = None, head_dim: int | None = None
) -> Found:
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
        found = Found(module.state_dict(), module.config, folder, "videoar")
    else:
        found = _read_foreign(source, head_dim)
    if lora is not None:
        merged = merge_lora(found.weights, read_weights(lora), file=lora)
        found = replace(found, weights=merged, format=f"{found.format} with {lora.name}")
    return found


def stated_head_dim(folder: Path) -> int | None:
    """Read the size of the heads from the config of a folder of any format."""
    for file in (folder / "transformer" / CONFIG, folder / CONFIG):
        if file.is_file():
            stated = read_json(file)
            if "dim" in stated and "num_heads" in stated:
                return stated["dim"] // stated["num_heads"]
            return stated.get("attention_head_dim", stated.get("head_dim"))
    return None


def _read_foreign(source: Path, head_dim: int | None) -> Found:
    source, entry = split_entry(source)
    if source.is_dir() and not any(source.glob("*.json")) and not any(source.glob("*.safe*")):
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
    weights, wrappers = unwrap(read_file(folder), entry=entry, file=folder)
    for part, says in OTHERS.items():
        if any(part in key for key in weights):
            raise ValueError(f"{folder} {says}")
    weights, names = our_names(weights)
    config = _config_of(weights, stated, stated_head_dim(folder) or head_dim, file=folder)
    if "scale_embedding.weight" not in weights:  # ours alone; zero changes nothing
        like = next(iter(weights.values()))
        weights["scale_embedding.weight"] = like.new_zeros(config.num_levels, config.hidden_size)
    words = f"{names} names" + "".join(f", entry {name}" for name in wrappers)
    found = Found(weights, config, folder, f"{words}, {'folder' if folder.is_dir() else 'file'}")
    assign_weights(build_empty(VideoTransformer, config), dict(weights), file=folder)
    return found


def our_names(weights: Weights) -> tuple[Weights, str]:
    """Rename the tensors of any family; say which names they had."""
    bare = {INFIXES.sub("", key): tensor for key, tensor in weights.items()}
    if averaged := {key: value for key, value in bare.items() if key.startswith("net_ema.")}:
        bare = averaged
    bare = {PREFIXES.sub("", key): tensor for key, tensor in bare.items()}
    patch = bare.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2:  # rCM; Wan's patches have 1 x 2 x 2 latent pixels
        bare["patch_embedding.weight"] = patch.unflatten(1, (-1, 1, 2, 2))
    if not any(".self_attn." in key for key in bare):
        return bare, "diffusers"
    return _renamed(bare, TOP, BLOCK), "original Wan"


def wan_names(weights: Weights) -> Weights:
    """Rename from ours to the original's; the inverse of `our_names`."""
    top, block = ({new: old for old, new in table.items()} for table in (TOP, BLOCK))
    return _renamed(weights, top, block)


def _renamed(weights: Weights, top: Mapping[str, str], block: Mapping[str, str]) -> Weights:
    renamed = {}
    for key, tensor in weights.items():
        match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", key)
        assert match is not None
        prefix, stem, suffix = (part or "" for part in match.groups())
        renamed[prefix + (block if prefix else top).get(stem, stem) + suffix] = tensor
    return renamed


def merge_lora(weights: Weights, lora: Weights, *, file: Path) -> Weights:
    """Return weights with low-rank updates added: `W + alpha / rank * B A`, in float32.

    Without `alpha` in the file it is the rank, as in LongLive.
    """
    parts: dict[str, Weights] = {}
    wrong = []
    for key, tensor in lora.items():
        if match := LORA.fullmatch(key):
            part = match[2] or "alpha"
            parts.setdefault(f"{match[1]}.weight", {})[SIDES.get(part, part)] = tensor
        else:
            wrong.append(key)
    renamed = our_names({key: torch.empty(0) for key in parts})[0]
    updates = dict(zip(renamed, parts.values(), strict=True))
    wrong += [key for key, v in updates.items() if key not in weights or not {"A", "B"} <= {*v}]
    if wrong or not updates:
        raise ValueError(
            f"{file} is no LoRA of this model: it has {len(wrong)} tensors that do not belong to "
            f"it, such as {wrong[0] if wrong else 'none at all'!r}; use one that was trained on it"
        )
    merged = dict(weights)
    for key, update in updates.items():
        down, up = update["A"].float(), update["B"].float()
        scale = float(update["alpha"]) / len(down) if "alpha" in update else 1.0
        if (up.shape[0], down.shape[1]) != weights[key].shape or up.shape[1] != len(down):
            raise ValueError(
                f"{file} updates {key!r} by {tuple(up.shape)} x {tuple(down.shape)}, but its shape "
                f"is {tuple(weights[key].shape)}; use a LoRA of this model"
            )
        merged[key] = (weights[key].float() + scale * (up @ down)).to(weights[key].dtype)
    return merged


def _config_of(
    weights: Weights, stated: Mapping[str, Any], head_dim: int | None, *, file: Path
) -> ModelConfig:
    """Read sizes from the config if there is one, and from the shapes of the weights if not."""
    if "num_attention_heads" in stated:
        for name, value in FIXED.items():
            if stated.get(name, value) != value:
                raise ValueError(
                    f"{file}/config.json gives {name} {stated[name]!r}, but only {value!r} can be "
                    "run; use a text-to-video model of Wan 2.1"
                )
        fields = {ours: stated[name] for name, ours in FIELDS.items() if name in stated}
        patch = stated.get("patch_size", [1, 2, 2])
        if not isinstance(patch, list) or patch != [1, *2 * patch[1:2]]:
            raise ValueError(
                f"{file}/config.json gives patch_size {patch!r}, but only one frame and a square "
                "of it, such as [1, 2, 2], can be run; use a text-to-video model of Wan 2.1"
            )
        return build_config(ModelConfig, {**fields, "patch": patch[1]}, file=file / CONFIG)
    head_dim = head_dim or 128
    if (bias := weights.get("patch_embedding.bias")) is not None and len(bias) % head_dim:
        raise ValueError(
            f"{file} has {len(bias)} channels, which are no whole number of heads of {head_dim}; "
            "pass the folder of its base model, whose config states the heads, as --base"
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


def plain(found: Found) -> Weights:
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
            "--format videoar"
        )
    return weights


def save_diffusers(folder: Path, found: Found) -> None:
    """Write `transformer/` of a diffusers folder."""
    fields, patch = asdict(found.config), found.config.patch
    config = {"_class_name": "WanTransformer3DModel", **FIXED}
    config |= {theirs: fields[ours] for theirs, ours in FIELDS.items()}
    config |= {"out_channels": config["in_channels"], "patch_size": [1, patch, patch]}
    save_weights(folder / FILE, plain(found), config)


def save_wan(folder: Path, found: Found) -> None:
    """Write a folder under the original's names."""
    fields, channels = asdict(found.config), found.config.latent_channels
    same = ("eps", "ffn_dim", "freq_dim", "num_heads", "num_layers")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": found.config.hidden_size}
    config |= {"in_dim": channels, "out_dim": channels, "text_len": 512}
    config |= {name: fields[name] for name in same}
    save_weights(folder / FILE, wan_names(plain(found)), config)


def offload(model: VideoTransformer, device: torch.device | str) -> None:
    """Keep the matrices of the blocks on the host; each visits `device` while it is used.

    A pass then waits for its weights, but the device holds one of them at a time.
    """
    inside = [part for part in model.blocks.modules() if isinstance(part, nn.Linear)]
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
