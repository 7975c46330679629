"""Files of Wan's families through the commands, and their presets against their published loops.

Each file holds the tiny random transformer of a Wan folder, so each must give its very video.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli import main
from videoar.core.cache import KVCache
from videoar.core.noise import unit_noise
from videoar.data.video import read_video
from videoar.generation.pipeline import VideoPipeline

pytestmark = pytest.mark.xdist_group("wan")

Tensors = dict[str, torch.Tensor]
SMALL = ("--height", "32", "--width", "32", "--num-frames", "25")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of embeddings out of the user's home."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers with all parts."""
    return tiny_wan.save(tiny_wan.pipeline(), tmp_path_factory.mktemp("families") / "wan")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the original with all parts."""
    pipe = tiny_wan.pipeline()
    return tiny_wan.save_original(pipe, tmp_path_factory.mktemp("families") / "original")


def _weights(prefix: str = "", *, seed: int = 0) -> Tensors:
    """The transformer under the original's names; another seed gives one that must not be used."""
    weights = tiny_wan.randomise(tiny_wan.transformer(), scale=0.1, seed=seed).state_dict()
    return {prefix + tiny_wan.transformer_name(key): tensor for key, tensor in weights.items()}


def _pt(tree: Callable[[], Any]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        torch.save(tree(), folder / "model.pt")
        return [str(folder / "model.pt")]

    return write


def _linear(weights: Tensors) -> Tensors:
    """As rCM stores the patches."""
    key = next(key for key in weights if key.endswith("patch_embedding.weight"))
    return weights | {key: weights[key].flatten(1)}


def _krea(folder: Path) -> list[str]:
    save_file(_weights("model."), folder / "krea.safetensors")
    return [str(folder / "krea.safetensors")]


def _longlive(folder: Path) -> list[str]:
    """Take an update from one matrix, and give it back in a second file as LongLive does."""
    weights, rng = _weights("model."), torch.Generator().manual_seed(3)
    stem = "blocks.1.self_attn.q"
    down, up = torch.randn(4, 24, generator=rng), torch.randn(24, 4, generator=rng)
    weights[f"model.{stem}.weight"] = weights[f"model.{stem}.weight"] - up @ down
    lora = {
        f"base_model.model.{stem}.lora_{name}.weight": x
        for name, x in zip("AB", (down, up), strict=True)
    }
    torch.save({"generator": weights}, folder / "longlive_base.pt")
    torch.save({"generator_lora": lora}, folder / "lora.pt")
    return [str(folder / "longlive_base.pt"), "--lora", str(folder / "lora.pt")]


def _chosen(folder: Path) -> list[str]:
    """The demo of Causal-Forcing takes the weights that are not averaged."""
    tree = {"generator": _weights("model."), "generator_ema": _weights("model.", seed=7)}
    torch.save(tree, folder / "causal_forcing.pt")
    return [f"{folder / 'causal_forcing.pt'}#generator"]


FSDP = "model._fsdp_wrapped_module."
FILES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "Self-Forcing": (
        "self-forcing",
        _pt(lambda: {"generator": _weights("model.", seed=7), "generator_ema": _weights("model.")}),
    ),
    "CausVid": ("causvid", _pt(lambda: {"generator": _weights("model.")})),
    "Causal-Forcing, chunks": ("causal-forcing", _chosen),
    "Causal-Forcing, frames": (
        "causal-forcing-frame",
        _pt(lambda: {"generator": _weights(seed=7), "generator_ema": _weights(FSDP)}),
    ),
    "LongLive": ("longlive", _longlive),
    "rCM": ("rcm", _pt(lambda: _linear(_weights("net.")))),
    "rCM, averaged": (
        "rcm",
        _pt(lambda: _linear(_weights("net.", seed=7)) | _linear(_weights("net_ema."))),
    ),
    "Krea": ("self-forcing", _krea),
}


def _run(*words: object) -> None:
    assert main.main([str(word) for word in words]) == 0


def _generated(file: Path, model: object, *words: object) -> np.ndarray:
    steps = ("--num-inference-steps", "2") if "wan" in words else ()
    _run("generate", "a red ball", "--model", model, *words, *SMALL, *steps, "--out", file)
    return read_video(file).frames


@pytest.mark.parametrize("base", ["wan", "original"])
@pytest.mark.parametrize("family", FILES)
def test_every_file_gives_the_video_of_its_folder(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, base: str
) -> None:
    """A file with a Wan folder for codec and text is the model that the folder itself is."""
    folder, (preset, write) = request.getfixturevalue(base), FILES[family]
    source, *lora = write(tmp_path)
    expected = _generated(tmp_path / "a.mkv", folder, "--preset", preset)
    found = _generated(tmp_path / "b.mkv", source, *lora, "--base", folder, "--preset", preset)
    assert expected.std() > 5
    _check_same(found, expected)


@pytest.mark.parametrize("family", ["Self-Forcing", "LongLive", "rCM", "Krea"])
def test_weights_alone_ask_for_their_preset(
    tmp_path: Path, wan: Path, family: str, capsys: pytest.CaptureFixture
) -> None:
    """Sampled like plain Wan, a model of few steps would show 50 steps of mush without a word."""
    words = [*FILES[family][1](tmp_path), "--base", str(wan)]
    for command in (
        ["generate", "a cat", "--model", *words, "--out", str(tmp_path / "a.mp4")],
        ["convert", words[0], str(tmp_path / "ours"), *words[1:]],
    ):
        assert main.main(command) == 2
        assert "does not say how it is sampled: name its preset" in capsys.readouterr().err
    assert not {"a.mp4", "ours"} & {path.name for path in tmp_path.iterdir()}


def test_what_is_no_transformer_is_called_what_it_is(tmp_path: Path, capsys) -> None:
    """A list of a thousand missing tensors helps nobody who mixed up two files."""
    _longlive(tmp_path)
    torch.save({"decoder.conv1.weight": torch.zeros(2)}, tmp_path / "vae.pth")
    torch.save(_weights() | {"img_emb.proj.0.weight": torch.zeros(2)}, tmp_path / "i2v.pth")
    says = {"lora.pt": "pass it as lora", "vae.pth": "pass it as codec", "i2v.pth": "a picture"}
    for name, word in says.items():
        assert main.main(["info", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert word in error
        assert len(error) < 200 + len(str(tmp_path))


def _check_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare but for rounding: how files align their tensors changes sums in the last bit."""
    change = np.abs(found.astype(int) - expected)
    assert change.max() <= 1
    assert change.mean() < 1e-3


def _tensors(folder: Path) -> Tensors:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.relative_to(folder)} {key}": tensor
        for file in files
        for key, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("family", [*FILES, "folder", "original"])
def test_conversion_there_and_back_loses_nothing(
    tmp_path: Path, wan: Path, original: Path, family: str
) -> None:
    """Ours, diffusers and ours again: every tensor of every part, and the video."""
    folders = {"folder": ("wan", lambda _: [wan]), "original": ("wan", lambda _: [original])}
    preset, write = (FILES | folders)[family]
    words = [*write(tmp_path), *([] if family in folders else ["--base", wan])]
    ours, theirs, again = (tmp_path / name for name in ("ours", "theirs", "again"))
    _run("convert", words[0], ours, *words[1:], "--preset", preset)
    _run("convert", ours, theirs, "--format", "diffusers")
    _run("convert", theirs, again, "--preset", preset)
    first, last = _tensors(ours), _tensors(again)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert {key.split("/")[0].split()[0] for key in first} == {"transformer", "codec", "text"}
    assert tiny_wan.diffusers.WanPipeline.from_pretrained(theirs).vae is not None
    steps = ("--num-inference-steps", "2")
    source = _generated(tmp_path / "a.mkv", *words, "--preset", preset, *steps)
    for name, folder in (("b", ours), ("c", again)):  # its preset is stored in it
        _check_same(_generated(tmp_path / f"{name}.mkv", folder, *steps), source)


def test_the_other_ways_to_run_a_model(tmp_path: Path, wan: Path) -> None:
    """A precision, and weights that wait on the host: the same picture but for rounding."""
    wide = _generated(tmp_path / "a.mkv", wan, "--preset", "self-forcing")
    waiting = _generated(tmp_path / "b.mkv", wan, "--preset", "self-forcing", "--offload")
    _check_same(waiting, wide)
    words = ("--preset", "self-forcing", "--dtype", "bfloat16", "--device", "cpu")
    narrow = _generated(tmp_path / "c.mkv", wan, *words)
    assert 0 < np.abs(narrow.astype(float) - wide).mean() < 10


def test_info_tells_the_parts_and_what_a_video_needs(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture
) -> None:
    """Format, precision and size of every part; a forecast that follows length, window, dtype."""
    (source, *lora) = FILES["LongLive"][1](tmp_path)
    asked = ["info", source, *lora, "--base", str(original), "--preset", "longlive"]

    def told(*words: str) -> str:
        assert main.main([*asked, *words]) == 0
        return capsys.readouterr().out

    out = told("--seconds", "30")
    pipe = tiny_wan.pipeline()
    counts = [tiny_wan.codec_of_full_depth(), pipe.text_encoder]
    for part in counts:
        assert f"{sum(p.numel() for p in part.parameters()):,}" in out
    assert "original Wan names, entry generator, file with lora.pt" in out
    assert all(name in out for name in ("WanCodec", "UMT5PromptEncoder", "VideoTransformer"))
    assert "memory for 30 s of 832x480, in a window of 12 latent frames" in out
    # A chunk of three reads nine frames of 30 x 52 tokens, and six are in a pass; two layers of 24
    # channels in float32.
    tokens, chunk = 9 * 30 * 52, 3 * 30 * 52
    token = 2 * 2 * 24 * 4 / 2**20
    held = (tokens + 2 * chunk) * token
    assert f"{held:.2f} MiB, {tokens} tokens and {2 * chunk} of a pass" in out
    assert f"{held / 2:.2f} MiB, {tokens} tokens" in told("--dtype", "bfloat16")
    assert f"{3 * chunk * token:.2f} MiB, {chunk} tokens" in told("--window", "6")
    assert "memory for 5 s" in told("--seconds", "5")


# ---------------------------------------------------------------- what cannot be used


class _Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def _cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = sorted(folder.glob(name))[0]
        file.write_bytes(file.read_bytes()[:-100])

    return change


def _state(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        stated = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(stated | values))

    return change


def _replaced(name: str, *, by: Callable[[Path], Any], without: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / without)
        torch.save(by(folder.parent / "ran"), folder / name)

    return change


def _lose_shard(folder: Path) -> None:
    sorted((folder / "text_encoder").glob("*.safetensors"))[0].unlink()


def _second(folder: Path) -> None:
    shutil.copytree(folder / "transformer", folder / "transformer_2")


WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "transformer cut": (_cut(f"transformer/{WEIGHTS}"), "is truncated or damaged"),
    "codec cut": (_cut(f"vae/{WEIGHTS}"), "is truncated or damaged"),
    "text encoder cut": (_cut("text_encoder/*.safetensors"), "is truncated or damaged"),
    "text shard lost": (_lose_shard, "lacks 1 of"),
    "tokenizer cut": (_cut("tokenizer/tokenizer.json"), "tokenizer.json cannot be used"),
    "code in the codec": (
        _replaced("Wan2.1_VAE.pth", by=lambda file: {"x": _Code(file)}, without="vae"),
        "could run code",
    ),
    "half a codec": (
        _replaced(
            "Wan2.1_VAE.pth",
            by=lambda _: {"encoder.conv1.weight": torch.ones(8, 3, 3, 3, 3)},
            without="vae",
        ),
        "has 1 that WanCodec does not know",
    ),
    "two experts": (_second, "a second transformer, as Wan 2.2 has"),
    "words for sizes": (
        _state(f"transformer/{CONFIG}", num_layers="two"),
        "num_layers is 'two': use int",
    ),
    "another patch": (_state(f"transformer/{CONFIG}", patch_size=2), "patch_size 2"),
    "another width": (_state(f"transformer/{CONFIG}", ffn_dim=64), "in shape (48, 24)"),
    "more layers": (_state(f"transformer/{CONFIG}", num_layers=3), "lacks 27 of the"),
    "fewer layers": (_state(f"transformer/{CONFIG}", num_layers=1), "has 27 that"),
    "another text width": (_state(f"text_encoder/{CONFIG}", d_ff=16), "in shape (32, 16)"),
    "words in the text": (_state(f"text_encoder/{CONFIG}", d_ff="x"), "text_encoder cannot be"),
    "index of nothing": (
        _state(f"transformer/{WEIGHTS}.index.json", metadata={}),
        "names no files",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_folder_is_refused_in_one_sentence(
    tmp_path: Path, wan: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    """By `generate` and `convert`: exit code 2, one line that says why, nothing run or written."""
    change, words = BAD[case]
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    change(folder)
    for command in (
        ["generate", "ball", "--model", str(folder), *SMALL, "--out", str(tmp_path / "a.mkv")],
        ["convert", str(folder), str(tmp_path / "ours")],
    ):
        assert main.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("videoar: error: ")
        assert error.count("\n") == 1
        assert words in error, error
    assert {path.name for path in tmp_path.iterdir()} <= {"wan", "home"}


# ---------------------------------------------------------------- presets


class Buffer(KVCache):
    """The cache of the published code: every pass writes into it, and it shifts when it is full.

    As `CausalWanSelfAttention` of Self-Forcing and LongLive has it; lengths are in tokens.
    """

    def __init__(self, *, size: int, sink: int):
        super().__init__()
        self.size, self.sink, self.start = size, sink, 0
        self.passed: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple:
        """Put in the keys and values of a pass, and return all that it reads."""
        new, nothing = key.shape[2], key[:, :, :0]
        end, keys, values = self.passed.get(layer, (0, nothing, nothing))
        if self.start + new > end:  # the first pass of a unit
            gone = slice(self.sink, self.sink + max(0, keys.shape[2] + new - self.size))
            keys, values = (
                torch.cat([x[:, :, : gone.start], x[:, :, gone.stop :]], dim=2)
                for x in (keys, values)
            )
        else:
            keys, values = keys[:, :, :-new], values[:, :, :-new]
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        self.passed[layer] = self.start + new, keys, values
        return keys, values


def _warped(*steps: int, shift: float) -> list[float]:
    """Look steps up in the shifted table of 1000 timesteps, as `warp_denoising_step` does."""
    sigmas = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    table = (1000 * shift * sigmas / (1 + (shift - 1) * sigmas)).tolist()
    return [table[1000 - step] for step in steps]


@torch.inference_mode()
def _published(
    pipe: VideoPipeline, *, frames: int, block: int, timesteps: list[float], local: int, sink: int
) -> torch.Tensor:
    """Generate as the published loops do: noise, four predictions, a clean pass for the cache."""
    model, text = pipe.transformer, pipe.encode(["ball"])
    buffer, done = Buffer(size=local * 4, sink=sink * 4), []  # 2 x 2 tokens a frame
    for index, first in enumerate(range(0, frames, block)):
        buffer.start = first * 4
        axes = (torch.arange(first, first + block), torch.arange(2), torch.arange(2))
        coords = torch.cartesian_prod(*axes, torch.arange(1)).float()
        x = unit_noise((5,), index, (block * 4, model.config.token_dim))
        inputs: dict[str, Any] = {"coords": coords, "text": text, "cache": buffer}
        inputs["unit"] = torch.zeros(block * 4, dtype=torch.long)
        clean = x
        for number, timestep in enumerate(timesteps):
            sigma = timestep / 1000
            flow = model(x, sigma=torch.tensor([[sigma]]), **inputs).velocity
            clean = x - sigma * flow
            if number + 1 < len(timesteps):
                after = timesteps[number + 1] / 1000
                fresh = unit_noise((5,), index, tuple(x.shape[1:]), draw=number + 1)
                x = (1 - after) * clean + after * fresh
        model(clean, sigma=torch.zeros(1, 1), **inputs)
        done.append(clean)
    return torch.cat(done, dim=1)


FOUR = _warped(1000, 750, 500, 250, shift=5.0)
CHUNKS = {"frames": 30, "block": 3, "timesteps": FOUR, "local": 21, "sink": 0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "self-forcing": CHUNKS,
    "causvid": CHUNKS | {"timesteps": [1000.0, 757.0, 522.0]},
    "longlive": CHUNKS | {"local": 12, "sink": 3},
    "causal-forcing": CHUNKS,
    "causal-forcing-frame": CHUNKS | {"block": 1, "frames": 24},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_loops(wan: Path, name: str) -> None:
    """Timesteps, step rule, window and sinks of a family; past the window too."""
    published = PUBLISHED[name]
    pipe = replace(VideoPipeline.from_pretrained(wan, preset=name), height=32, width=32)
    generation = pipe.generate(["ball"], num_frames=4 * published["frames"] - 3, seeds=[5])
    with torch.inference_mode():
        found = torch.cat([finished.tokens for finished in generation.sampler], dim=1)
    expected = _published(pipe, **published)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    other = published | {"local": published["local"] - 3}
    assert (found - _published(pipe, **other)).abs().max() > 1e-3
    assert Checkpoint.find(wan).sampling(name)["height"] == 480


@torch.inference_mode()
def test_the_preset_of_rcm_is_its_loop(wan: Path) -> None:
    """All frames at once, with angles turned into noise levels; from pure noise on."""
    pipe = replace(VideoPipeline.from_pretrained(wan, preset="rcm"), height=32, width=32)
    generation = pipe.generate(["ball"], num_frames=9, seeds=[5])
    found = torch.cat([finished.tokens for finished in generation.sampler], dim=1)
    angles = torch.tensor([torch.pi / 2, 1.5, 1.4, 1.0, 0.0], dtype=torch.float64)
    times = (angles.sin() / (angles.sin() + angles.cos())).tolist()
    coords = torch.cartesian_prod(*map(torch.arange, (3, 2, 2, 1))).float()
    x, unit = unit_noise((5,), 0, (12, 64)), torch.zeros(12, dtype=torch.long)
    for number, (now, after) in enumerate(itertools.pairwise(times)):
        inputs = {"coords": coords, "unit": unit, "text": pipe.encode(["ball"])}
        velocity = pipe.transformer(x, sigma=torch.tensor([[now]]).float(), **inputs).velocity
        fresh = unit_noise((5,), 0, (12, 64), draw=number + 1)
        x = (1 - after) * (x - now * velocity) + after * fresh
    torch.testing.assert_close(found, x, atol=1e-4, rtol=0)


def test_timesteps_are_those_that_the_models_were_distilled_at() -> None:
    """Written out, as Self-Forcing prints them, and as the 4-step CausVid has them."""
    assert [round(t, 1) for t in FOUR] == [1000.0, 937.5, 833.3, 625.0]
    assert [round(t, 1) for t in _warped(1000, 750, 500, 250, shift=8.0)] == [
        1000.0,
        960.0,
        888.9,
        727.3,
    ]
