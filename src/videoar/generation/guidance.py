"""Guidance away from another prompt."""

import torch
from torch import Tensor

from videoar.core.transformer import Network, Output


class Guided:
    """Classifier-free guidance around a network (Ho and Salimans 2022, arXiv:2207.12598).

    The cache and the text hold the conditional batch followed by the unconditional one.
    """

    def __init__(self, network: Network, scale: float):
        self.network, self.scale, self.config = network, scale, network.config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guided) and vars(self) == vars(other)

    def __call__(self, tokens: Tensor, **inputs) -> Output:
        both = self.network(tokens=torch.cat([tokens] * 2), **inputs).velocity
        conditional, unconditional = both.chunk(2)
        return Output(unconditional + self.scale * (conditional - unconditional))
