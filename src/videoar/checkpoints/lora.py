"""Low-rank updates of published files, merged into the weights of their base model."""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from videoar.checkpoints.wan import INFIXES, PREFIXES, wan_names
from videoar.checks import explained
from videoar.weights import Weights, read_json, read_weights, split_entry

PART = re.compile(
    r"(.+)\.(?:lora_(A|B|down|up)(?:\.[\w-]+)?\.weight"
    r"|(?:lora_(?:B|up)(?:\.[\w-]+)?\.(bias))|(alpha|diff|diff_b|diff_m))"
)
LAYER = re.compile(r"\.(weight|bias)$")
SIDES = {"down": "A", "up": "B"}
# What trainers that write underscores for dots put before a name.
TRAINERS = re.compile(r"^(?:lora_unet|lora_transformer|lycoris)_+")
# What is published under the name of low-rank updates and is none, by a part of its names.
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon in Tucker's form",
    "oft_": "OFT",
}
# What PEFT and diffusers put before the names that their patterns are for.
WRAPPED = re.compile(r"^(?:base_model\.model|transformer)\.")
CONFIG = "adapter_config.json"
# Fields of PEFT's configs under which an update is more than `alpha / rank * B A`.
UNKNOWN = ("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication")


def split_strength(source: str | Path) -> tuple[Path, float]:
    """Split `FILE=STRENGTH`."""
    file, _, strength = str(source).rpartition("=")
    if not file or split_entry(Path(source))[0].exists() or not split_entry(Path(file))[0].exists():
        return Path(source), 1.0
    return Path(file), _number(strength, str(source), Path(file))


def merge_lora(weights: Weights, source: Path, *, strength: float = 1.0) -> Weights:
    """Return weights with updates added in float32: `W + alpha / rank * B A`, or a plain `diff`.

    Where nothing states alpha it is the rank, as in LongLive.
    """
    updates, stated = _updates(source, weights), _stated(source)
    merged = dict(weights)
    for layer, (name, update) in updates.items():
        weight = f"{layer}.weight" if f"{layer}.weight" in weights else layer  # modulation
        added = {"diff": (weight, strength), "diff_b": (f"{layer}.bias", strength)}
        if "A" in update:
            scale = strength * _scale(name, update, stated, file=source)
            added |= {"product": (weight, scale), "bias": (f"{layer}.bias", scale)}
            product = update["B"].float().flatten(1) @ update["A"].float().flatten(1)
            if product.shape == weights[weight].flatten(1).shape:  # a convolution, maybe
                product = product.view_as(weights[weight])
            update["product"] = product
        for part, (key, factor) in added.items():
            if (change := update.get(part)) is None:
                continue
            old = weights.get(key)
            if old is None or change.shape != old.shape:
                shape = "none: there is no such tensor" if old is None else tuple(old.shape)
                raise ValueError(
                    f"{source} updates {key!r} by {tuple(change.shape)}, but its shape is {shape}; "
                    "use a LoRA of this model"
                )
            merged[key] = (merged[key].float() + factor * change.float()).to(old.dtype)
    return merged


def _updates(source: Path, weights: Weights) -> dict[str, tuple[str, Weights]]:
    """Read the parts of the updates, by our layers, with the names that these have in the file."""
    updates: dict[str, tuple[str, Weights]] = {}
    layers, wrong = _layers(weights), []
    for key, tensor in read_weights(source).items():
        if kind := next((OTHERS[part] for part in OTHERS if part in key), None):
            raise ValueError(f"{source} holds {key!r}, as {kind} has it: use a plain LoRA")
        match = PART.fullmatch(key)
        name, part = (match[1], match[2] or match[3] or match[4]) if match else (key, "")
        if part == "diff_m":
            name, part = f"{name}.modulation", "diff"
        bare = TRAINERS.sub("", PREFIXES.sub("", INFIXES.sub("", name))).replace(".", "_")
        if not part or bare not in layers:
            wrong.append(key)
            continue
        update = updates.setdefault(layers[bare], (name, {}))[1]
        if (part := SIDES.get(part, part)) in update:
            raise ValueError(
                f"{source} gives {part} of {layers[bare]!r} twice, once as {key!r}; use one adapter"
            )
        update[part] = tensor
    wrong += [name for name, update in updates.values() if not _whole(update)]
    if wrong or not updates:
        raise ValueError(
            f"{source} is no LoRA of this model: it has {len(wrong)} tensors that do not belong to "
            f"it, such as {wrong[0] if wrong else 'none at all'!r}; use one that was trained on it"
        )
    return updates


def _whole(update: Weights) -> bool:
    """Check that two sides fit, or that nothing needs them."""
    if not update.keys() & {"A", "B", "alpha", "bias"}:
        return True
    sides = [update[side] for side in "AB" if side in update and update[side].ndim > 1]
    return len(sides) == 2 and 0 < len(sides[0]) == sides[1].flatten(1).shape[1]


def _layers(weights: Weights) -> dict[str, str]:
    """Return our layers by diffusers' and the original's names, with underscores for dots."""
    layers: dict[str, str] = {}
    for names in (weights, wan_names(weights)):
        for name, key in zip(names, weights, strict=True):
            layer = LAYER.sub("", key)
            meant = layers.setdefault(LAYER.sub("", name).replace(".", "_"), layer)
            assert meant == layer, f"{name} names two layers"
    return layers


def _stated(source: Path) -> dict[str, dict[str, Any]]:
    """Read what is said of alpha and rank, in PEFT's words, by where it is said."""
    file = split_entry(source)[0]
    config = (file if file.is_dir() else file.parent) / CONFIG
    found = {str(config): read_json(config)} if config.is_file() else {}
    files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
    for each in (file for file in files if file.suffix == ".safetensors"):
        with safe_open(each, "pt") as opened:
            header = opened.metadata() or {}
            kohya = any(".lora_down." in key for key in opened.keys())
        if (text := header.get("lora_adapter_metadata")) is not None:
            place = f"lora_adapter_metadata of {each.name}"
            says = f"{place} is no JSON object; use another file"
            with explained(says, ValueError, AttributeError):
                values = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
            found[place] = values
        # Without a number it is the rank. Under the names `lora_A` the file was converted:
        # musubi-tuner then multiplies the sides by it, and leaves the header as it was.
        if kohya and header.get("ss_network_alpha", "None") not in ("None", "0", "0.0"):
            values = {"lora_alpha": header["ss_network_alpha"], "r": header.get("ss_network_dim")}
            found[f"ss_network_alpha of {each.name}"] = values
    for place, values in found.items():
        wrong = [f"{name} {values[name]!r}" for name in UNKNOWN if values.get(name)]
        if (kind := values.get("peft_type", "LORA")) != "LORA":
            wrong.append(f"peft_type {kind!r}")
        if wrong:
            raise ValueError(f"{place} gives {wrong[0]}, which cannot be merged; use a plain LoRA")
    return found


def _scale(name: str, update: Weights, stated: dict[str, dict[str, Any]], *, file: Path) -> float:
    """Return what an update is multiplied by; raise where two places say different things."""
    rank, found = len(update["A"]), {}
    if own := "alpha" in update:
        place = "its tensor alpha"
        found[place] = _number(update["alpha"].tolist(), place, file) / rank
    for place, config in stated.items():
        value, of = (
            _of_pattern(config, f"{kind}_pattern", name, config.get(default), place)
            for kind, default in (("alpha", "lora_alpha"), ("rank", "r"))
        )
        if own and value == "Dynamic":  # resized: each update has its own
            continue
        if not own and of not in (None, "Dynamic", rank) and _number(of, place, file) != rank:
            raise ValueError(
                f"{place} gives {name!r} the rank {of}, but {file} has it with rank {rank}; keep "
                "beside it only the configuration it was trained with"
            )
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        found[place] = _number(value, place, file) / root
    least, most = (choose(found, key=found.__getitem__, default=None) for choose in (min, max))
    if least is None or most is None:
        return 1.0
    # Tensors in bfloat16 are exact to 1 in 256.
    if not math.isclose(found[least], found[most], rel_tol=4e-3):
        raise ValueError(
            f"{file} updates {name!r} {found[least]:g} times by {least}, but {found[most]:g} times "
            f"by {most}; remove the one that is wrong"
        )
    return found[least]


def _of_pattern(config: dict[str, Any], field: str, name: str, default: Any, place: str) -> Any:
    """Look a layer up as PEFT does: the first pattern that ends its name decides."""
    name = WRAPPED.sub("", name)
    says = f"{place} has no {field} that can be read ({{}}); correct it"
    with explained(says, TypeError, ValueError, re.error):
        patterns = dict(config.get(field) or {})
        fits = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name))
        return next(fits, default)


def _number(value: Any, place: str, file: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place} gives {value!r}, but a number is needed for {file}; correct it")
    return number
