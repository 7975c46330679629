"""Latents that are known before a unit is generated, and those that come of finished units."""

import itertools

import torch
from einops import rearrange
from torch import Tensor

from videoar.core.tokens import Known, Latents, Tokens, gather
from videoar.core.units import Unit, Units
from videoar.machine import sent


def known_tokens(latents: Latents, units: Units, *, patch: int = 2) -> dict[int, Known]:
    """Find the units that first latent frames of a clip or stream reach into."""
    frames, known = latents.shape[1], {}
    for unit in itertools.islice(units, units.units_of(frames)):
        # Levels pool height and width alone, so a token is known if its frame is.
        mask = unit.grid_index[:, 0] < frames
        if mask.any():
            start = torch.tensor([unit.frame_start, 0, 0, 0])
            cells = (unit.grid_index - start) * mask[:, None]  # any that is there, for the others
            near = latents[:, unit.frame_start : unit.frame_start + units.segment_frames]
            mask = mask.to(latents.device)
            known[unit.index] = Known(mask, gather(near, cells, patch) * mask[:, None])
    return known


class Assembler:
    """Collect the tokens of finished units and hand out the latent frames that are complete."""

    def __init__(self, units: Units, *, patch: int = 2):
        self.units, self.patch, self.done = units, patch, 0
        self._open: Tokens | None = None
        """The cells of a segment, whose frames are overwritten by those of the next one."""

    def add(self, unit: Unit, tokens: Tokens) -> Latents | None:
        """Store a unit; return the newly complete latent frames, None if there are none."""
        height, width, segment = self.units.height, self.units.width, self.units.segment_frames
        area = height * width
        if self._open is None:
            self._open = tokens.new_zeros(len(tokens), area * segment, tokens.shape[2])
        t, h, w, level = unit.grid_index.unbind(1)
        places = torch.stack([torch.arange(unit.size), (t % segment * height + h) * width + w])
        rows, cells = sent(places[:, level == 0], tokens.device)
        self._open[:, cells] = tokens[:, rows]
        start, count = self.done % segment, unit.complete_frames - self.done
        if count <= 0:
            return None
        self.done = unit.complete_frames
        axes = "b (t h w) (c p q) -> b t c (h p) (w q)"
        grid = self._open[:, area * start : area * (start + count)].clone()
        return rearrange(grid, axes, h=height, w=width, p=self.patch, q=self.patch)

    def state_dict(self) -> dict[str, Tensor]:
        """The frames that are begun but not complete."""
        begun = {} if self._open is None else {"open": self._open.clone()}
        return {"done": torch.tensor(self.done)} | begun

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on like the one that gave `state`."""
        self.done, self._open = int(state["done"]), state.get("open")
