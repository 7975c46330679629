"""The training of a router: on exact data it learns what is right, and a run goes on to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian import gaussian_costs
from tiny import tiny_pipeline

from videoar.cli.main import main
from videoar.data.latents import LatentsInfo, ShardWriter
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.router import Router, RouterConfig
from videoar.training.loop import train
from videoar.training.recipes import find
from videoar.training.router import Measured, Routing, RoutingConfig, added_up
from videoar.training.run_folder import read_log

FRAMES, SIZES, PASS = 6, [1, 2, 3], 0.07
MENU = tuple(f"chunk:{size}" if size > 1 else "frame" for size in SIZES)


def gaussian_clips(count: int, *, seed: int) -> tuple[Router, Measured, torch.Tensor]:
    """Clips of which every second is busy, and what their segments cost, which is exact."""
    rng = torch.Generator().manual_seed(seed)
    busy = torch.arange(count) % 2
    rho = torch.where(busy > 0, 0.1, 0.9)[:, None, None, None]
    latents = [torch.randn(count, 2, 4, 4, generator=rng)]
    for _ in range(FRAMES - 1):
        fresh = torch.randn(latents[0].shape, generator=rng)
        latents.append(rho * latents[-1] + (1 - rho**2).sqrt() * fresh)
    clips, values = torch.stack(latents, dim=1), torch.full((count, FRAMES, 3, 3), torch.nan)
    for kind, correlation in enumerate((0.9, 0.1)):
        for segment in gaussian_costs([correlation] * FRAMES, 1):
            if segment.frames in SIZES:
                found = torch.tensor([segment.cost + PASS, segment.cost, 1.0])
                values[busy == kind, segment.start, SIZES.index(segment.frames)] = found
    words = torch.zeros(count, 1, 3, 8)
    router = Router(RouterConfig(menu=MENU, latent_channels=2, text_channels=8, hidden_size=16))
    seen = [router.features(clips[:, :start], [(words, words)]) for start in range(FRAMES)]
    return router, Measured(torch.stack(seen, dim=1), values), busy


def test_what_choices_add_up_to_is_that_of_every_partition() -> None:
    """The best of all, by trying all of them; and the mean over draws, by drawing."""
    _, clips, _ = gaussian_clips(2, seed=0)

    def partitions(start: int) -> list[list[tuple[int, int]]]:
        if start == FRAMES:
            return [[]]
        ends = [(k, start + size) for k, size in enumerate(SIZES) if start + size <= FRAMES]
        return [[(start, k), *rest] for k, end in ends for rest in partitions(end)]

    sums = torch.stack(
        [sum(clips.values[:, s, k] for s, k in parts) for parts in partitions(0)], dim=1
    )
    best, _ = added_up(clips.values, SIZES)
    assert torch.allclose(best[:, 0], sums[..., 0].amin(1))
    logits = torch.randn(2, FRAMES, len(SIZES), generator=torch.Generator().manual_seed(0))
    shares = []
    for parts in partitions(0):
        each = torch.ones(2)
        for start, k in parts:
            fits = [n for n, size in enumerate(SIZES) if start + size <= FRAMES]
            each = each * logits[:, start, fits].softmax(1)[:, fits.index(k)]
        shares.append(each)
    mean = (torch.stack(shares, dim=1)[..., None] * sums).sum(1)
    assert torch.allclose(added_up(clips.values, SIZES, logits)[0], mean)
    with pytest.raises(ValueError, match="no sum of"):
        added_up(clips.values[:, :5], [2, 2, 4])


def test_a_router_learns_what_calm_and_busy_clips_want() -> None:
    """On clips that it never saw: what hangs together in small units, noise as a whole."""
    router, clips, _ = gaussian_clips(64, seed=0)
    router.mean.copy_(clips.features.mean((0, 1)))
    router.std.copy_(clips.features.std((0, 1)).clamp(min=1e-3))
    objective = Routing(router, SIZES)
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    batch, rng = clips.get(list(range(64)), np.random.default_rng(0)), torch.Generator()
    for _ in range(120):
        optimizer.zero_grad()
        objective.loss(batch, rng)["loss"].backward()
        optimizer.step()
    _, apart, busy = gaussian_clips(64, seed=1)
    with torch.no_grad():
        logits = 1e6 * router(apart.features)
    best, wanted = added_up(apart.values, SIZES)
    ours, _ = added_up(apart.values, SIZES, logits)
    alone = [added_up(apart.values, SIZES, 1e6 * one.expand(1, FRAMES, 3)) for one in torch.eye(3)]
    gap = min(float(found[:, 0].mean()) for found, _ in alone) - float(best[:, 0].mean())
    assert gap > 0.1
    assert float((ours - best)[:, 0].mean()) < 0.5 * gap  # as before two frames nothing tells
    for found in (logits, wanted):
        single = found[:, [2, 4], :2].argmax(2) == 0  # and no two frames together
        assert single[busy == 0].float().mean() > 0.9
        assert single[busy == 1].float().mean() < 0.1


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """The recipe, on a few clips of noise."""
    root = tmp_path_factory.mktemp("router")
    pipe = tiny_pipeline()
    checkpoint, codec = pipe.save_pretrained(root / "tiny"), pipe.codec
    info = LatentsInfo(codec=codec.fingerprint(), channels=4, stride=codec.stride, fps=16.0)
    rng = torch.Generator().manual_seed(0)
    with ShardWriter(root / "latents", info=info) as writer:
        for number in range(6):
            writer.add(torch.randn(3, 4, 4, 4, generator=rng), captions=[f"a ball {number}"])
    task = RoutingConfig(
        checkpoint=str(checkpoint),
        latents=root / "latents",
        units=("frame", "chunk:2"),
        frames=3,
        draws=2,
        hidden_size=8,
    )
    how = {"steps": 4, "batch_size": 4, "log_every": 1, "save_every": 2, "sample_every": 4}

    def make(out: str, **changes: object) -> object:
        changed = replace(task, **changes)
        return replace(find("router"), task=changed, out=root / out, **how)

    return make


def test_a_killed_run_goes_on_to_the_bit(recipe) -> None:
    """Killed while it measures and while it trains: what is measured is not measured again."""
    said: list[str] = []
    whole = recipe("whole")
    folder = train(whole, report=said.append)
    assert sum("as frame" in line for line in said) == 3
    assert any("the best one" in line and "oracle" in line for line in said)
    killed = recipe("killed")

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("frames 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, report=stop)
    said.clear()
    train(replace(killed, steps=2), report=said.append)
    assert sum("as frame" in line for line in said) == 1
    again = train(killed, report=said.append)
    assert sum("as frame" in line for line in said) == 1
    losses = [
        [row["loss"] for row in read_log(run.out) if "loss" in row] for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
    ours, theirs = (VideoPipeline.from_pretrained(path) for path in (folder, again))
    for name, value in ours.router.state_dict().items():
        assert torch.equal(value, theirs.router.state_dict()[name])
    assert ours("a ball", units="auto", num_frames=9).frames.shape[0] == 9
    assert ours.meta["router"]["config"]["task"]["pass_cost"] == whole.task.pass_cost


def test_what_was_measured_otherwise_is_measured_anew(recipe) -> None:
    """Other draws cost otherwise; a run that has not begun may be made of something else."""
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if "frames 1" in line:
            raise KeyboardInterrupt

    for draws in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            train(recipe("other", draws=draws), report=stop)
    assert sum(line.startswith("frames 0 to 0") for line in said) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 1}, "draws is 1: use 2 or more"),
        ({"units": ("frame",)}, "two or more units"),
        ({"frames": 9}, "0 clips of 9 latent frames"),
    ],
)
def test_what_cannot_be_learned_is_refused(recipe, changes: dict, message: str) -> None:
    """In one sentence, before anything is measured where that can be."""
    with pytest.raises(ValueError, match=message):
        train(recipe("refused", **changes))


def test_the_command_names_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`videoar train router` is one of the recipes, and a missing folder is said in a sentence."""
    assert main(["train", "--list"]) == 0
    assert "router " in capsys.readouterr().out
    words = ["train", "router", "--data.path", str(tmp_path / "none"), "--task.num-videos", "0"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "there is no folder" in capsys.readouterr().err
