"""The benchmark of a card, on whatever there is; and what only a card can show."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import BenchGpu, run
from tiny import MODEL, tiny_transformer

from videoar.core.flow import sigma_steps
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.units import Units, Visible
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig


def _tiny(out: Path, **options: object) -> BenchGpu:
    stated = {
        "units": ("chunk:3", "cube:6x2x4/wavefront"),
        "windows": (6,),
        "num_inference_steps": (2,),
        "how": ("plain", "graphs"),  # compilation takes a minute
    }
    return BenchGpu(device="cpu", tiny=True, repeats=1, out=out, **{**stated, **options})


def test_the_benchmark_of_a_card_times_what_gives_the_same_latents(tmp_path: Path) -> None:
    """A ratio of speeds says nothing if one side computes something else."""
    table = run(_tiny(tmp_path / "gpu.json"), lambda line: None)
    found = json.loads((tmp_path / "gpu.json").read_text())
    cube = "cube:6x2x4/wavefront"
    assert [row["units"] for row in found["rows"]] == ["chunk:3"] * 2 + [cube] * 2
    assert [row["how"] for row in found["rows"]] == ["plain", "graphs"] * 2
    assert [row["tokens"] for row in found["rows"]] == [48] * 4
    assert all(0 < row["difference"] < 1e-5 or not row["difference"] for row in found["rows"])
    assert found["tests"].startswith("not run")
    assert len(table.splitlines()) == 8


def test_the_benchmark_of_a_card_says_what_it_left_out(tmp_path: Path) -> None:
    """It ends in time, and a table that is short must not look whole."""
    table = run(_tiny(tmp_path / "gpu.json", minutes=1e-9), lambda line: None)
    assert "4 cases left out" in table
    assert len(json.loads((tmp_path / "gpu.json").read_text())["left_out"]) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chunk:3", "cube:1x2x2/wavefront", "multiscale:4,2,1"])
@torch.inference_mode()
def test_a_card_gives_the_latents_of_the_host(name: str) -> None:
    """The same seed is the same video, wherever it is computed."""
    words, found = torch.randn(1, 5, MODEL.text_dim), []
    for device in ("cpu", "cuda"):
        model = tiny_transformer().to(device)
        units = Units(parse(name), 9, 4, 4)
        window = Visible(window=2 * units.units_per_segment)
        config = SamplerConfig(sigmas=sigma_steps(2), visible=window)
        text = model.encode_text(words.to(device))
        sampler = Sampler(model, units, text, config, seeds=(0,), device=device)
        found.append(torch.cat([each.tokens.cpu() for each in sampler], dim=1))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_a_card_decodes_the_pictures_of_the_host() -> None:
    """The joined decoder has no oneDNN there; float32 convolutions may be TF32."""
    codec, latents = TinyCodec(TinyCodecConfig.toy()), torch.randn(1, 5, 16, 4, 4)
    expected = codec.decode(latents)
    shown = codec.to("cuda").decode(latents.cuda()).cpu()
    torch.testing.assert_close(shown, expected, atol=2e-2, rtol=0)
