"""Wan's parts against diffusers and transformers, and the families' settings against plain loops.

Everything is tiny and random. The folder is written by diffusers itself.
"""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from einops import rearrange
from reference import to_latents
from safetensors.torch import load, load_file, save

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import Note
from videoar.cli import main
from videoar.core.noise import unit_noise
from videoar.core.sampler import SamplerConfig
from videoar.core.schemes import parse
from videoar.core.tokens import to_tokens
from videoar.core.units import Units
from videoar.encoders import umt5
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.encoders.wan_codec import WanCodec, WanCodecConfig
from videoar.generation.config import STEPS, GenerationConfig
from videoar.generation.pipeline import VideoPipeline

# Importing diffusers takes longer than all tests here: one worker does it.
pytestmark = pytest.mark.xdist_group("wan")
diffusers = pytest.importorskip("diffusers", reason="the extra `wan` is not installed")
transformers = pytest.importorskip("transformers")

SIZE = {"height": 32, "width": 32}
PROMPT = "a  red ball &amp; a “blue” square"  # to be cleaned


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of embeddings out of the user's home."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The pipeline of diffusers at tiny size."""
    return tiny_wan.pipeline()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers saves of it, with the text encoder in shards."""
    path = tiny_wan.save(theirs, tmp_path_factory.mktemp("wan") / "tiny-wan")
    assert len(list((path / "text_encoder").glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def pipe(folder: Path) -> VideoPipeline:
    """The same folder, loaded by us."""
    return replace(VideoPipeline.from_pretrained(folder), **SIZE)


# ---------------------------------------------------------------- transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("timestep", [1000.0, 833.3333, 17.0])
def test_the_transformer_is_that_of_diffusers(
    folder: Path, dtype: torch.dtype, per_token: bool, timestep: float
) -> None:
    """With the same weights the same velocity, to 1e-6; in bfloat16 nearer to float32 than theirs.

    What is rounded there between two kernels stays in float32 here.
    """
    reference = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
    ours = Checkpoint.find(folder).transformer().build(dtype=dtype)
    for name, parameter in reference.named_parameters():
        assert parameter.dtype == ours.get_parameter(name).dtype, name
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 16, 8, 8, generator=rng).to(dtype)
    text = torch.randn(2, 7, 16, generator=rng).to(dtype)
    units = Units(parse("full"), 3, 4, 4)
    levels = torch.tensor([timestep, 400.0])[:, None].repeat(1, 48 if per_token else 1)
    if per_token:
        levels = levels * torch.linspace(0.5, 1, 48)
    with torch.inference_mode():
        sample = rearrange(latents, "b t c h w -> b c t h w")
        given = levels if per_token else levels[:, 0]
        expected = reference(sample, given, text, return_dict=False)[0].float()
        exact = reference.float()(sample.float(), given, text.float(), return_dict=False)[0]
        velocity = ours(
            to_tokens(latents, units),
            coords=units.coords,
            sigma=levels / 1000,
            unit=torch.arange(48) if per_token else units.unit,
            text=ours.encode_text(text),
        ).velocity
    found = rearrange(to_latents(velocity, units), "b t c h w -> b c t h w").float()
    assert expected.abs().max() > 0.2
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - exact).norm() <= 1.05 * (expected - exact).norm() + 1e-5


def test_our_names_of_the_original_are_those_of_diffusers() -> None:
    """Two tables written apart: the one here and the converter of diffusers."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from videoar.checkpoints.wan import wan_names

    weights = tiny_wan.transformer().state_dict()
    back = convert_wan_transformer_to_diffusers(dict(wan_names(weights)))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


# ---------------------------------------------------------------- codec


def _clip(frames: int, *, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(2, frames, 3, 32, 32, generator=rng) * 2 - 1


@torch.inference_mode()
def test_the_codec_is_that_of_diffusers(theirs: Any, pipe: VideoPipeline) -> None:
    """Latents and pixels are those of AutoencoderKLWan, normalised as its pipeline does."""
    clip, config = _clip(9), theirs.vae.config
    mean, std = (
        torch.tensor(values).view(1, 1, 16, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    latents = pipe.codec.encode(clip)
    mode = theirs.vae.encode(rearrange(clip, "b t c h w -> b c t h w")).latent_dist.mode()
    expected = (rearrange(mode, "b c t h w -> b t c h w") - mean) / std
    assert torch.equal(latents, expected)
    raw = rearrange(latents * std + mean, "b t c h w -> b c t h w")
    pixels = rearrange(theirs.vae.decode(raw).sample, "b c t h w -> b t c h w")
    assert pixels.std() > 0.05
    assert torch.equal(pipe.codec.decode(latents), pixels)


@torch.inference_mode()
def test_the_memory_of_a_stream_is_freed_as_it_is_replaced(pipe: VideoPipeline) -> None:
    """Old and new at once would make a stream need more memory than the whole clip."""
    stream, latents = pipe.codec.stream_decoder(), pipe.codec.encode(_clip(9))
    stream(latents[:, :2])
    old = [weakref.ref(tensor) for tensor in stream._memory if tensor.ndim == 5]
    alive: list[int] = []
    last = pipe.codec.vae.decoder.conv_out
    hook = last.register_forward_pre_hook(
        lambda *_: alive.append(sum(r() is not None for r in old))
    )
    stream(latents[:, 2:])
    hook.remove()
    assert alive[0] <= 2 < len(old)


@pytest.mark.parametrize("splits", [(1, 4, 4), (5, 4), (9,)])
def test_streams_of_the_codec_equal_the_whole(pipe: VideoPipeline, splits: tuple) -> None:
    """Bit for bit, with two streams in turn on one module, and through a saved state."""
    codec, clip = pipe.codec, _clip(9)
    latents = codec.encode(clip)
    whole = codec.decode(latents)
    decoder, other, parts = codec.stream_decoder(), codec.stream_decoder(), []
    for part in latents.split([1 + (n - 1) // 4 if n % 4 else n // 4 for n in splits], dim=1):
        parts.append(decoder(part))
        other(part * 0.5)
        decoder, old = codec.stream_decoder(), decoder
        decoder.load_state_dict(load(save(old.state_dict())))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert whole.shape == clip.shape


def test_weights_of_taehv_load_as_a_codec(tmp_path: Path, folder: Path) -> None:
    """`taew2_1.pth` is a bare dictionary under the names that `TinyCodec` has."""
    torch.manual_seed(0)
    tiny = TinyCodec(TinyCodecConfig()).eval()
    torch.save(tiny.state_dict(), tmp_path / "taew2_1.pth")
    found = Checkpoint.find(tmp_path / "taew2_1.pth").codec()
    assert isinstance(found, TinyCodec)
    assert found.config == TinyCodecConfig()
    latents = torch.randn(1, 2, 16, 4, 4)
    assert torch.equal(found.decode(latents), tiny.decode(latents))
    words = ("--model", str(folder), "--codec", str(tmp_path / "taew2_1.pth"), "--height", "32")
    words = (*words, "--width", "48", "--num-frames", "5", "--num-inference-steps", "1")
    assert main.main(["generate", "ball", *words, "--out", str(tmp_path / "a.mkv")]) == 0


def test_the_codec_of_wan_2_2_is_refused(tmp_path: Path, folder: Path) -> None:
    """It has other strides; it must not pass for the one of Wan 2.1."""
    shutil.copytree(folder / "vae", tmp_path / "wan" / "vae")
    file = tmp_path / "wan" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 2}))
    with pytest.raises(ValueError, match=r"patch_size 2, as Wan 2\.2 .* Wan 2\.1, or its codec"):
        Checkpoint.find(tmp_path / "wan").codec()


# ---------------------------------------------------------------- text


@torch.inference_mode()
def test_prompts_are_encoded_as_in_diffusers(theirs: Any, folder: Path) -> None:
    """Cleaned, 512 rows, zero behind the end: attention has no mask, so these zeros are read."""
    prompts = [PROMPT, "", "left"]
    expected = theirs._get_t5_prompt_embeds(prompts, max_sequence_length=512)
    encoder = umt5.UMT5PromptEncoder.find(folder)
    found = encoder.encode(prompts)
    assert found.shape == (3, 512, 16)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    counts = found.any(dim=-1).sum(dim=1).tolist()
    assert counts == [len(theirs.tokenizer(umt5.clean(p)).input_ids) for p in prompts]


def test_embeddings_come_from_disk_and_the_encoder_is_freed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second video with a prompt reads no 11 GB; a damaged file is computed again."""
    encoder = umt5.UMT5PromptEncoder.find(folder)
    first = encoder.encode(["ball", "left"])
    files = sorted((tmp_path / "home").rglob("*.safetensors"))
    assert len(files) == 2
    assert not any(isinstance(value, torch.nn.Module) for value in vars(encoder).values())
    monkeypatch.setattr(umt5.UMT5PromptEncoder, "load", _never)
    again = umt5.UMT5PromptEncoder.find(folder)
    assert torch.equal(again.encode(["left", "ball"]), first.flip(0))
    monkeypatch.undo()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    files[0].write_bytes(b"broken")
    assert torch.equal(umt5.UMT5PromptEncoder.find(folder).encode(["ball", "left"]), first)
    narrow = umt5.UMT5PromptEncoder.find(folder, dtype=torch.bfloat16).encode(["ball", "left"])
    assert narrow.dtype == torch.bfloat16
    assert not torch.equal(narrow.float(), first)


def _never(self: object) -> None:
    raise AssertionError("the text encoder was loaded")


def test_what_is_wrong_with_the_text_side_is_said(tmp_path: Path, folder: Path) -> None:
    """A lost shard, a prompt that is too long: one sentence, before the model is read."""
    encoder = umt5.UMT5PromptEncoder.find(folder)
    with pytest.raises(ValueError, match="tokens, but the limit is 512"):
        encoder.encode(["xyz " * 400])
    shutil.copytree(folder / "text_encoder", tmp_path / "wan" / "text_encoder")
    with pytest.raises(ValueError, match="no text encoder with its tokenizer"):
        umt5.UMT5PromptEncoder.find(tmp_path / "wan")
    shutil.copytree(folder / "tokenizer", tmp_path / "wan" / "tokenizer")
    sorted((tmp_path / "wan").rglob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="lacks 1 of"):
        umt5.UMT5PromptEncoder.find(tmp_path / "wan").encode(["ball"])


# ---------------------------------------------------------------- whole folders


def _latents(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 4, 4, generator=torch.Generator().manual_seed(11))


@torch.inference_mode()
def _sampled(pipe: VideoPipeline, **options: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Return the decoded video as floats, and as the frames that a user gets."""
    arguments = {"num_frames": 9, "seeds": [0], **options}
    generation = pipe.generate([PROMPT], **arguments)
    sampler = generation.sampler
    tokens = torch.cat([finished.tokens for finished in sampler], dim=1)
    decoded = pipe.codec.decode(to_latents(tokens, sampler.units))
    frames = np.concatenate(list(pipe.generate([PROMPT], **arguments)), axis=1)
    return decoded, frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_diffusers_gives_the_video_of_diffusers(
    folder: Path, dtype: torch.dtype
) -> None:
    """From the same noise in the same steps: text, guidance, transformer, codec, all of it."""
    reference = diffusers.WanPipeline.from_pretrained(folder, dtype=dtype)
    reference.vae.float()
    reference.text_encoder.float()
    reference.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "negative_prompt": "left"}
    expected = reference(
        PROMPT,
        num_frames=9,
        num_inference_steps=4,
        latents=rearrange(_latents(), "b t c h w -> b c t h w"),
        output_type="pt",
        **SIZE,
        **options,
    ).frames
    pipe = VideoPipeline.from_pretrained(folder, dtype=dtype)
    pipe.prompt_encoder = umt5.UMT5PromptEncoder.find(folder)
    pipe.height, pipe.width = SIZE["height"], SIZE["width"]
    options |= {"num_inference_steps": 4}
    decoded, frames = _sampled(pipe, latents=_latents(), **options)
    assert frames.shape == (1, 9, 32, 32, 3)
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    assert (decoded / 2 + 0.5 - expected).abs().max() <= limit
    pixels = (255 * rearrange(expected, "b t c h w -> b t h w c")).round().numpy()
    assert np.abs(frames - pixels).max() <= 1 + 255 * limit
    options = {"num_inference_steps": 4, "guidance_scale": 1.0}
    moved, _ = _sampled(pipe, latents=_latents(), **options)
    if dtype == torch.float32:  # rounding to bfloat16 is as large as what guidance changes here
        assert (decoded - moved).abs().max() > 10 * limit


EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler": (EULER, {"shift": 3.0}),
    "euler, shift left out": (EULER, {}),
    "unipc": (UNIPC, {"flow_shift": 3.0, **FLOW}),
    "unipc, shift 5": (UNIPC, {"flow_shift": 5.0, **FLOW}),
}


def _scheduled(folder: Path, kind: str, stated: dict[str, Any], target: Path) -> Path:
    """Write the folder again, with another scheduler as diffusers saves it."""
    shutil.copytree(folder, target)
    getattr(diffusers, kind)(**stated).save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("case", SCHEDULERS)
@torch.inference_mode()
def test_a_folder_of_diffusers_gives_the_latents_of_diffusers(
    folder: Path, tmp_path: Path, case: str
) -> None:
    """From the same noise with the defaults of both: 50 steps, guidance 5, its own scheduler."""
    source = _scheduled(folder, *SCHEDULERS[case], tmp_path / "wan")
    reference = diffusers.WanPipeline.from_pretrained(source)
    reference.set_progress_bar_config(disable=True)
    noise = rearrange(_latents(), "b t c h w -> b c t h w")
    expected = reference(PROMPT, num_frames=9, latents=noise, output_type="latent", **SIZE).frames
    pipe = replace(VideoPipeline.from_pretrained(source), **SIZE)
    sampler = pipe.generate([PROMPT], num_frames=9, seeds=[0], latents=_latents()).sampler
    ours = to_latents(torch.cat([part.tokens for part in sampler], dim=1), sampler.units)
    change = (rearrange(ours, "b t c h w -> b c t h w") - expected).abs().max()
    assert change <= 1e-4 * expected.abs().max()
    # The other solver, or another grid, is seen.
    other = replace(pipe, sampling=pipe.sampling.replaced(step="euler"))
    sampler = other.generate([PROMPT], num_frames=9, seeds=[0], latents=_latents()).sampler
    moved = to_latents(torch.cat([part.tokens for part in sampler], dim=1), sampler.units)
    assert (moved - ours).abs().max() > 10 * change


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("case", ["euler", "unipc"])
def test_the_grids_are_those_of_diffusers(case: str, shift: float) -> None:
    """Sigmas, and the timesteps that the model is told, which UniPC cuts off to whole ones."""
    kind, stated = SCHEDULERS[case]
    theirs = getattr(diffusers, kind)(**stated | {key: shift for key in stated if "shift" in key})
    options = GenerationConfig(step="flow-match-euler" if case == "euler" else case, shift=shift)
    for steps in range(1, 61):
        theirs.set_timesteps(steps)
        schedule = options.replaced(num_inference_steps=steps).schedule
        config = SamplerConfig(sigmas=schedule, **STEPS.get(options.step, {}))
        told = [config.told(sigma) for sigma in schedule[:-1]]
        assert torch.allclose(torch.tensor(schedule), theirs.sigmas, atol=2e-6)
        assert torch.allclose(1000 * torch.tensor(told), 1.0 * theirs.timesteps)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@torch.inference_mode()
def test_unipc_samples_units_as_diffusers_would(folder: Path, tmp_path: Path, steps: int) -> None:
    """Frame after frame, each by a scheduler of its own, in a plain loop without a cache."""
    source = _scheduled(folder, *SCHEDULERS["unipc"], tmp_path / "wan")
    pipe = replace(VideoPipeline.from_pretrained(source), **SIZE)
    frames, cells = 3, 4
    options = {"units": "frame", "num_inference_steps": steps, "guidance_scale": 1.0}
    sampler = pipe.generate(["a ball"], num_frames=9, seeds=[5], **options).sampler
    model, text = pipe.transformer, pipe.encode(["a ball"])
    frame = torch.arange(frames).repeat_interleave(cells)
    where = torch.cartesian_prod(torch.arange(frames), torch.arange(2), torch.arange(2))
    coords = torch.cat([where, torch.zeros(len(where), 1)], dim=1).float()
    past = torch.zeros(1, 0, 64)
    for number, part in enumerate(sampler):
        x, until = unit_noise((5,), number, (cells, 64)), (number + 1) * cells
        scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(source / "scheduler")
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            levels = torch.cat([torch.zeros(past.shape[1]), torch.full((cells,), timestep / 1000)])
            velocity = model(
                torch.cat([past, x], dim=1),
                coords=coords[:until],
                sigma=levels[None],
                unit=torch.arange(until),
                text=text,
                mask=frame[:until, None] >= frame[None, :until],
            ).velocity[:, -cells:]
            x = scheduler.step(velocity, timestep, x).prev_sample
        torch.testing.assert_close(part.tokens, x, atol=2e-4, rtol=1e-3)
        past = torch.cat([past, x], dim=1)


ODD_SCHEDULERS = {
    "_class_name 'DPMSolverMultistepScheduler'": {"_class_name": "DPMSolverMultistepScheduler"},
    "use_karras_sigmas True": {"_class_name": UNIPC, **FLOW, "use_karras_sigmas": True},
    "solver_order 3": {"_class_name": UNIPC, **FLOW, "solver_order": 3},
    "prediction_type None": {"_class_name": UNIPC, "use_flow_sigmas": True},
    "stochastic_sampling True": {"_class_name": EULER, "stochastic_sampling": True},
}


@pytest.mark.parametrize("said", ODD_SCHEDULERS)
def test_a_scheduler_that_is_not_run_is_said(tmp_path: Path, said: str) -> None:
    """What is done instead is one line; an absent field has the default of diffusers."""
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(ODD_SCHEDULERS[said] | {"flow_shift": 2.0, "shift": 2.0}))
    with pytest.warns(Note, match=f"gives {said}, which is not run: Euler steps of shift 2 are"):
        assert Checkpoint.find(tmp_path).sampling()["step"] == "euler"


@pytest.mark.parametrize("shift", ["3.0", 0, None, -1, True])
def test_a_shift_that_is_no_number_is_refused(tmp_path: Path, shift: Any) -> None:
    """It would be replaced silently, or fail in the middle of loading."""
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": EULER, "shift": shift}))
    with pytest.raises(ValueError, match=f"gives shift {shift!r}, not a number above 0"):
        Checkpoint.find(tmp_path).sampling()


@pytest.mark.parametrize("case", ["euler", "unipc"])
def test_a_scheduler_survives_conversion(folder: Path, tmp_path: Path, case: str) -> None:
    """Through our format and back, where the folder is not there any more."""
    source = _scheduled(folder, *SCHEDULERS[case], tmp_path / "wan")
    expected, ours, back = Checkpoint.find(source).sampling(), tmp_path / "ours", tmp_path / "back"
    assert main.main(["convert", str(source), str(ours)]) == 0
    assert main.main(["convert", str(ours), str(back), "--format", "diffusers"]) == 0
    assert Checkpoint.find(ours).sampling() == expected
    assert Checkpoint.find(back).sampling() == expected
    theirs = diffusers.WanPipeline.from_pretrained(back).scheduler
    assert type(theirs).__name__ == SCHEDULERS[case][0]


def test_latents_take_the_place_of_seeded_noise(pipe: VideoPipeline) -> None:
    """Given the noise of a seed, the video is that of the seed, for units in any order."""
    for name in ("full", "chunk:2", "key-detail:3", "cube:1x1x2"):
        units = pipe.lattice(name, 9)
        noise = [unit_noise((4,), u.index, (len(u.cells), 64)) for u in units]
        latents = to_latents(torch.cat(noise, dim=1), units)
        options = {"units": name, "num_inference_steps": 2, "guidance_scale": 1.0}
        seeded = list(pipe.generate(["a"], num_frames=9, seeds=[4], **options))
        given = pipe.generate(["a"], num_frames=9, seeds=[4], latents=latents, **options)
        assert np.array_equal(np.concatenate(list(given), axis=1), np.concatenate(seeded, axis=1))


@pytest.mark.parametrize(
    ("units", "frames", "num_frames"),
    [("full", 2, 9), ("multiscale:2,1", 3, 9), ("frame", 3, None)],
)
def test_latents_that_do_not_fit_are_refused(
    pipe: VideoPipeline, units: str, frames: int, num_frames: int | None
) -> None:
    """Another length, levels that would share their noise, an endless stream."""
    with pytest.raises(ValueError, match="cannot be the noise of this video"):
        pipe.generate(
            ["a"],
            num_frames=num_frames,
            seeds=[0],
            units=units,
            window_frames=3,
            latents=_latents()[:, :frames],
        )


# ---------------------------------------------------------------- the families' settings

# Frames of a block, what a list of timesteps says, the shift of its grid (None: as it is), frames
# that are read and those of them that are the first of all: as the families publish them.
FAMILIES = {
    "self-forcing": (3, (1000, 750, 500, 250), 5.0, 21, 0),
    "causvid": (3, (1000, 757, 522), None, 21, 0),
    "longlive": (3, (1000, 750, 500, 250), 5.0, 12, 3),
    "causal-forcing": (3, (1000, 750, 500, 250), 5.0, 21, 0),
    "causal-forcing-frame": (1, (1000, 750, 500, 250), 5.0, 21, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_preset_samples_as_its_family_does(folder: Path, family: str) -> None:
    """Block after block by a plain loop without a cache: timesteps, step rule, clean past, window.

    A noisy block reads clean ones with timestep 0; of these each has read what it could see then.
    """
    size, listed, shift, window, sinks = FAMILIES[family]
    grid = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    warped = grid if shift is None else shift * grid / (1 + (shift - 1) * grid)
    sigmas = [float(warped[1000 - step]) for step in listed]
    pipe = replace(VideoPipeline.from_pretrained(folder, preset=family), **SIZE)
    frames, per_frame = 24, 4
    generation = pipe.generate(["a ball"], num_frames=4 * frames - 3, seeds=[5])
    parts = list(generation.sampler)
    assert [part.tokens.shape[1] for part in parts] == [size * per_frame] * (frames // size)

    model, text = pipe.transformer, pipe.encode(["a ball"])
    frame = torch.arange(frames).repeat_interleave(per_frame)
    block = frame // size
    last = (block + 1) * size - 1  # the newest frame that a token may know of
    reads = (frame[None] <= last[:, None]) & (
        (frame[None] > last[:, None] - (window - sinks)) | (frame[None] < sinks)
    )
    cells = torch.cartesian_prod(torch.arange(frames), torch.arange(2), torch.arange(2))
    coords = torch.cat([cells, torch.zeros(len(cells), 1)], dim=1).float()
    past = torch.zeros(1, 0, 64)
    for number in range(frames // size):
        shape, until = (size * per_frame, 64), (number + 1) * size * per_frame
        x = unit_noise((5,), number, shape)
        for step, sigma in enumerate(sigmas, start=1):
            levels = torch.cat([torch.zeros(past.shape[1]), torch.full((shape[0],), sigma)])
            velocity = model(
                torch.cat([past, x], dim=1),
                coords=coords[:until],
                sigma=levels[None],
                unit=torch.arange(until),
                text=text,
                mask=reads[:until, :until],
            ).velocity[:, -shape[0] :]
            x = x - sigma * velocity
            if step < len(sigmas):
                fresh = unit_noise((5,), number, shape, draw=step)
                x = (1 - sigmas[step]) * x + sigmas[step] * fresh
        torch.testing.assert_close(parts[number].tokens, x, atol=2e-5, rtol=1e-4)
        past = torch.cat([past, x], dim=1)


# ---------------------------------------------------------------- the original's files


@pytest.fixture(scope="module")
def original(theirs: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the files of the original, under its names; the codec has its depth."""
    return tiny_wan.save_original(theirs, tmp_path_factory.mktemp("original") / "Wan2.1-T2V")


@torch.inference_mode()
def test_a_folder_of_the_original_is_the_same_model(
    original: Path, pipe: VideoPipeline, theirs: Any
) -> None:
    """Names, shapes and files differ; tensors, embeddings and decoded pixels do not."""
    found = VideoPipeline.from_pretrained(original)
    expected = dict(pipe.transformer.named_parameters())
    parameters = dict(found.transformer.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert found.sampling.units == "full"
    assert (found.height, found.width, found.sampling.shift) == (480, 832, 3.0)
    rows = found.prompt_encoder.encode([PROMPT])
    assert torch.equal(rows, pipe.prompt_encoder.encode([PROMPT]))
    codec = WanCodec(WanCodecConfig(base_dim=8)).eval()
    codec.vae.load_state_dict(tiny_wan.codec_of_full_depth().state_dict())
    latents = found.codec.encode(_clip(5))
    assert torch.equal(latents, codec.encode(_clip(5)))
    assert torch.equal(found.codec.decode(latents), codec.decode(latents))


def test_a_preset_without_effect_is_refused(
    folder: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original's format says nothing of sampling, and a scheduler that is there is copied."""
    for source, kind, says in (
        (original, "wan", "the format wan says nothing of how it is sampled"),
        (folder, "diffusers", "the format diffusers keeps the scheduler of the folder"),
    ):
        words = [str(source), str(tmp_path / kind), "--format", kind, "--preset", "self-forcing"]
        assert main.main(["convert", *words]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / kind).exists()


def test_a_folder_of_the_original_generates_and_converts(original: Path, tmp_path: Path) -> None:
    """Through the commands: a video, and there and back to the same tensors."""
    words = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "1"]
    file = str(tmp_path / "a.mkv")
    assert main.main(["generate", "ball", "--model", str(original), *words, "--out", file]) == 0
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main.main(["convert", str(original), str(ours)]) == 0
    assert main.main(["convert", str(ours), str(back), "--format", "wan"]) == 0
    name = "diffusion_pytorch_model.safetensors"
    first, last = load_file(original / name), load_file(back / name)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert main.main(["convert", str(original), str(tmp_path / "d"), "--format", "diffusers"]) == 0
    reference = diffusers.WanPipeline.from_pretrained(tmp_path / "d")
    names = {tiny_wan.transformer_name(key): key for key in reference.transformer.state_dict()}
    weights = reference.transformer.state_dict()
    assert all(torch.equal(weights[names[key]], first[key]) for key in first)


def test_the_parts_of_wan_are_shared(folder: Path, tmp_path: Path) -> None:
    """Fine-tuned models of one Wan need one text encoder of 11 GB: the fingerprint covers it."""
    ours = tmp_path / "ours"
    assert main.main(["convert", str(folder), str(ours)]) == 0
    whole = Checkpoint.find(ours)
    expected, before = VideoPipeline.from_pretrained(ours), whole.fingerprint()
    rows = expected.prompt_encoder.encode([PROMPT])
    for part in ("text", "codec"):
        shutil.rmtree(ours / part)
    shutil.copytree(folder, ours / "wan")
    meta = whole.meta | {"parts": {"text": "wan", "codec": "wan"}}
    (ours / "videoar.json").write_text(json.dumps(meta))
    found = VideoPipeline.from_pretrained(ours)
    latents = torch.randn(1, 2, 16, 4, 4)
    assert torch.equal(found.codec.decode(latents), expected.codec.decode(latents))
    assert torch.equal(found.prompt_encoder.encode([PROMPT]), rows)
    changed = Checkpoint.find(ours).fingerprint()
    assert changed != before
    (ours / "wan" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert Checkpoint.find(ours).fingerprint() != changed
