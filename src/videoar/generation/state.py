"""The state of a generation: tensors alone, so that a file of them is enough."""

import json
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


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
