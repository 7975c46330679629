"""Low-rank updates: trained beside frozen weights, merged into them, and written for others."""

from pathlib import Path
from typing import Any

from videoar.checks import import_extra
from videoar.data.latents import LatentShards, text_module
from videoar.generation.pipeline import VideoPipeline
from videoar.training.objectives import TextToVideo, own_weights
from videoar.weights import Weights, write_safetensors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
ADAPTER = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` of diffusers looks


def networks_of(pipe: VideoPipeline, shards: LatentShards) -> TextToVideo:
    """Return what of a pipeline reads a folder of latents."""
    return TextToVideo(pipe.transformer, text_module(pipe.prompt_encoder, shards.folder))


def trainable(pipe: VideoPipeline, shards: LatentShards, *, rank: int | None) -> TextToVideo:
    """Return it with weights of its own, of which all are trained, or low-rank updates alone."""
    module = networks_of(pipe, shards).requires_grad_(True)
    own_weights(module)
    if rank is not None:
        missing = "lora_rank needs peft, which is not installed: `pip install -e '.[train]'`"
        peft = import_extra("peft", missing)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        module.text.requires_grad_(False)
        peft.inject_adapter_in_model(config, pipe.transformer)  # which freezes the rest
    return module


def save_trained(pipe: VideoPipeline, folder: Path, meta: dict[str, Any]) -> None:
    """Write a checkpoint in which low-rank updates are merged, and beside it what they are.

    Their names are those of diffusers, and alpha is their rank, as it is where nothing states it.
    """
    model = pipe.transformer
    layers: list[tuple[str, Any]] = list(model.named_modules())
    updates = Weights()
    for name, module in layers:
        if hasattr(module, "get_base_layer"):
            for side in ("lora_A", "lora_B"):
                update = getattr(module, side)["default"].weight
                updates[f"transformer.{name}.{side}.weight"] = update.detach().contiguous()
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    pipe.meta = meta
    pipe.save_pretrained(folder, overwrite=True)
    if updates:
        write_safetensors(folder / ADAPTER, updates, {"format": "pt"})
