"""Low-rank updates of published files, merged into the weights of their base model."""

import re
from pathlib import Path

import torch

from videoar.checkpoints.wan import our_names
from videoar.weights import Weights

LORA = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.[\w-]+)?\.weight|alpha)")
SIDES = {"down": "A", "up": "B"}


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
