"""Low-rank updates of a transformer that is trained."""

from typing import Any

from torch import nn

from videoar.checks import import_extra
from videoar.core.transformer import VideoTransformer

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def add_low_rank(model: VideoTransformer, rank: int) -> None:
    """Freeze a transformer and put trainable low-rank updates beside its linear layers."""
    missing = "lora_rank needs peft, which is not installed: `pip install 'videoar[train]'`"
    peft = import_extra("peft", missing)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    peft.inject_adapter_in_model(config, model)


def merge_low_rank(model: nn.Module) -> None:
    """Put low-rank updates into the weights beside which they were trained."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in layers:
        if hasattr(module, "get_base_layer"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
