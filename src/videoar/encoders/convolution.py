"""A convolution with what follows it: one kernel where oneDNN has it."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Maps = Float[Tensor, "frames _ _ _"]


def one_kernel(weight: Tensor) -> bool:
    """Say whether oneDNN computes with such weights; every frame is then computed alone.

    Of few frames of few pixels torch leaves a part to a kernel that is half as fast, and whose last
    bits are others.
    """
    narrow = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    there = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return there and (narrow or weight.dtype == torch.float32)


class Convolution(nn.Module):
    """Convolution with a padding of 1, what is added, and ReLU: for inference, with a copy."""

    def __init__(self, weight: Float[Tensor, "_ _ _ _"], bias: Tensor | None, *, relu: bool):
        super().__init__()
        kernel = weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(kernel, requires_grad=False)
        self.bias, self.relu, self.one_kernel = bias, relu, one_kernel(weight)
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Maps, add: Maps | None = None) -> Tensor:
        if not self.one_kernel:
            x = F.conv2d(x, self.weight, self.bias, padding=1)
            x = x if add is None else x + add
            return F.relu(x) if self.relu else x
        sides = [1, 1], [1, 1], [1, 1]  # padding, stride, dilation
        weight = self._packed.get(x.shape)
        if weight is None:
            kernels: Any = torch._C._nn
            weight = self.weight.contiguous().to_mkldnn()
            weight = kernels.mkldnn_reorder_conv2d_weight(weight, *sides, 1, list(x.shape))
            self._packed[x.shape] = weight
        last, convolve = "relu" if self.relu else None, torch.ops.mkldnn._convolution_pointwise
        if add is None:
            return convolve(x, weight, self.bias, *sides, 1, last or "none", [], None)
        sums = "add", 1.0, last, [], None
        return convolve.binary(x, add, weight, self.bias, *sides, 1, *sums)
