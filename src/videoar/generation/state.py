"""The state of a generation: tensors alone, so that a file of them is enough."""

import json
from typing import Any

import torch
from torch import Tensor

from videoar import weights

State = dict[str, Tensor]
FORMAT = 1


def packed(value: Any) -> Tensor:
    """Return what can be JSON as a tensor, for a file of such."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpacked(state: State, name: str = "json") -> Any:
    """Return what was packed into a state.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(state[name].cpu().numpy().tobytes())
    except (KeyError, ValueError) as error:
        raise ValueError("this is no state of a generation: give what `save` wrote") from error


def copied(state: State) -> State:
    """Return a copy, whose tensors are not parts of others."""
    return {name: each.clone(memory_format=torch.contiguous_format) for name, each in state.items()}


def about(generation: Any) -> dict[str, Any]:
    """Say what this is a generation of: a state goes on in one that says the same."""
    pipe, units = generation.pipe, generation.sampler.units
    model, patch = generation.sampler.network, pipe.transformer.config.patch
    while not isinstance(model, torch.nn.Module):  # without guidance and recordings around it
        model = model.network
    return {
        "format": FORMAT,
        "model": weights.fingerprint(model),
        "codec": weights.fingerprint(pipe.codec),
        "height": units.height * pipe.codec.stride[1] * patch,
        "width": units.width * pipe.codec.stride[2] * patch,
        "num_frames": generation.num_frames,
        "begun": generation.begun.to_json(),
    } | ({} if pipe.router is None else {"router": pipe.router.mark})
