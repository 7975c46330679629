"""A router: before every segment of a stream it chooses the units that this is cut into.

It reads what is there by then, so it is as causal as what it chooses: statistics of the newest
frames, and the words as the transformer reads them. On what it is trained says `training.router`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videoar.checks import Count, Options, check
from videoar.core.schemes import names, parse
from videoar.core.tokens import Latents
from videoar.core.transformer import TextContext
from videoar.weights import fingerprint


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Options):
    """Shape of a router, and what it chooses from."""

    menu: tuple[str, ...]
    """Units, each of a number of frames."""
    latent_channels: Count
    """Of the latents."""
    text_channels: Count
    """Of the transformer, whose values of the words it reads."""
    frames: Count = 4
    """Newest latent frames that it reads, as far as there are any."""
    hidden_size: Count = 64
    """Width of both layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = all(parse(name).frames is not None for name in self.menu)
        right = ends and 1 < len(self.menu) == len(set(names(self.menu)))
        says = "two or more units of a number of frames each, none twice"
        check("menu", self.menu, right, says)


class Router(nn.Module):
    """Two layers over statistics, as there is little to learn from."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        given = 5 * config.latent_channels + 2 + config.text_channels
        for name, value in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.full((given,), value))
        layers = nn.Linear(given, size), nn.GELU(), nn.Linear(size, size), nn.GELU()
        self.layers = nn.Sequential(*layers, nn.Linear(size, len(config.menu)))

    @property
    def mark(self) -> str:
        """Name the weights, and what they choose from."""
        return f"{fingerprint(self)} of {', '.join(self.config.menu)}"

    def features(self, latents: Latents, text: TextContext) -> Float[Tensor, "batch features"]:
        """Describe the end of clips, which may be empty, and their words.

        Per channel of the newest frames: mean, power, and mean change from frame to frame, row to
        row and column to column; whether there is a frame, and a second one; the mean over the
        words of what the first layer of the transformer reads of them.
        """
        near = latents[:, -self.config.frames :].float()
        parts = [near, near.square(), *(near.diff(dim=axis).abs() for axis in (1, 3, 4))]
        pooled = [part.mean((1, 3, 4)).nan_to_num() for part in parts]
        there = near.new_tensor([near.shape[1] > 0, near.shape[1] > 1]).expand(len(near), -1)
        words = text[0][1][: len(near)].float().mean(2).flatten(1)  # none of a negative prompt
        return torch.cat([*pooled, there, words], dim=1)

    def forward(self, features: Float[Tensor, "*clips features"]) -> Float[Tensor, "*clips menu"]:
        """Return the logits of the units of the menu."""
        return self.layers((features.to(self.mean.device) - self.mean) / self.std)

    @torch.inference_mode()
    def choose(self, newest: list[Latents], text: TextContext) -> str:
        """Return the units of the next segment of one video: the likeliest ones."""
        nothing = text[0][1].new_zeros(1, 0, self.config.latent_channels, 1, 1)
        features = self.features(torch.cat(newest, dim=1) if newest else nothing, text)
        return self.config.menu[int(self(features)[0].argmax())]
