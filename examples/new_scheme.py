"""A unit scheme of one's own: drawn, checked and trained, without touching the package.

Columns of a latent frame are generated from the middle outwards. The two columns at the same
distance form a wave: they are generated side by side and do not see each other.

    python examples/new_scheme.py
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from videoar.core.flow import sigma_steps
from videoar.core.loss import FlowMatchingConfig
from videoar.core.noise import unit_noise
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import Cells, Scheme, box
from videoar.core.tokens import to_tokens
from videoar.core.transformer import ModelConfig, TextContext, VideoTransformer
from videoar.core.units import Units, Visible, token_mask
from videoar.data import world
from videoar.encoders.text_encoder import TextEncoder, TextEncoderConfig
from videoar.generation.latents import Assembler
from videoar.training.objectives import FlowMatching, TextToVideo

MODEL = ModelConfig(
    latent_channels=3,
    num_layers=2,
    num_heads=2,
    head_dim=24,
    ffn_dim=96,
    text_dim=16,
    freq_dim=16,
    rope_theta=100.0,
)
TEXT = TextEncoderConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, max_tokens=8)


@dataclass(frozen=True)
class Columns(Scheme):
    """Columns of a latent frame, from the middle outwards."""

    frames: int = 1

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        """Cut a segment into waves of columns at the same distance from the middle."""

        def distance(column: int) -> int:
            return abs(2 * column - width + 1)

        columns = sorted(range(width), key=distance)
        return [
            [box(range(frames), range(height), range(c, c + 1)) for c in wave]
            for _, wave in itertools.groupby(columns, key=distance)
        ]


def draw(units: Units) -> str:
    """Return the lattice with the number of every cell's unit, frames side by side."""
    unit_of = {cell[:3]: unit.index for unit in units for cell in unit.cells if cell[3] == 0}
    rows = []
    for h in range(units.height):
        frames = (
            " ".join(f"{unit_of[t, h, w]:2}" for w in range(units.width))
            for t in range(units.frames or 0)
        )
        rows.append("    ".join(frames))
    return "\n".join(rows)


@torch.no_grad()
def sample_without_cache(
    model: VideoTransformer, units: Units, text: TextContext, config: SamplerConfig, *, seed: int
) -> Tensor:
    """Walk down the rows of the sigma matrix with the whole lattice in every pass."""
    index = torch.arange(len(units.sizes))
    mask = token_mask(config.visible.matrix(index, units.waves), units.unit, units.unit)
    noise = [
        unit_noise((seed,), i, (size, model.config.token_dim)) for i, size in enumerate(units.sizes)
    ]
    x = torch.cat(noise, dim=1)
    waves = units.waves.tolist()
    rows, count = config.rows(waves[-1] + 1), (len(config.sigmas) - 1) * (waves[-1] + 1)
    done = [[rows.done(row, wave) for wave in waves] for row in range(count + 1)]
    for now, after in itertools.pairwise(torch.tensor(config.sigmas)[torch.tensor(done)]):
        output = model(
            x, coords=units.coords, sigma=now[None], unit=units.unit, text=text, mask=mask
        )
        x = x + (after - now)[units.unit][None, :, None] * output.velocity
    return x


def check(scheme: Scheme) -> float:
    """Check the scheme on a lattice; return the largest difference that the cache makes."""
    units = Units(scheme, frames=3, height=4, width=5)  # a cell in no unit, or in two, fails here
    latents = torch.randn(1, 3, 3, 8, 10)
    parts = to_tokens(latents, units).split(units.sizes, dim=1)
    assembler = Assembler(units)
    frames = [assembler.add(unit, part) for unit, part in zip(units, parts, strict=True)]
    assert torch.equal(torch.cat([x for x in frames if x is not None], dim=1), latents)

    model = VideoTransformer(MODEL)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)  # it begins at zero
    text = model.encode_text(torch.randn(1, 4, MODEL.text_dim))
    config = SamplerConfig(sigmas=sigma_steps(3, shift=3.0), visible=Visible(window=6))
    with torch.no_grad():
        finished = sorted(
            Sampler(model, units, text, config, seeds=(7,)), key=lambda part: part.unit.index
        )
    cached = torch.cat([part.tokens for part in finished], dim=1)
    whole = sample_without_cache(model, units, text, config, seed=7)
    return float((cached - whole).abs().max())


def train(scheme: Scheme, *, steps: int = 20, report: Callable[[str], None]) -> list[float]:
    """Train a tiny model on the procedural world, pooled to 8x8 pixels; return the losses."""
    rng, draws = np.random.default_rng(0), torch.Generator().manual_seed(0)
    clips = [world.render(world.sample_scene(rng), num_frames=24)[::4] for _ in range(64)]
    video = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    latents = F.avg_pool2d(video.flatten(0, 1), 8).unflatten(0, video.shape[:2])

    objective = FlowMatching(
        TextToVideo(VideoTransformer(MODEL), TextEncoder(TEXT)),
        schemes=(scheme,),
        config=FlowMatchingConfig(clip_frames=3),
    )
    optimizer = torch.optim.AdamW(objective.module.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(latents), (16,), generator=draws)
        batch = {"latents": latents[rows], "text": torch.ones(16, 2, dtype=torch.long)}
        loss = objective.loss(batch, draws)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 5 == 4:
            report(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


def main(report: Callable[[str], None] = print) -> None:
    """Draw, check, train."""
    torch.manual_seed(0)
    scheme = Columns()
    units = Units(scheme, frames=2, height=4, width=4)
    report(draw(units))
    report(f"{len(units.sizes)} units in {int(units.waves.max()) + 1} waves")
    report(f"cached and uncached sampling differ by {check(scheme):.1e}")
    train(scheme, report=report)


if __name__ == "__main__":
    main()
