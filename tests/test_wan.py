"""Wan's parts against diffusers and transformers, and the families' settings against plain loops.

Everything is tiny and random. The folder is written by diffusers itself.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from einops import rearrange
from safetensors.torch import load, save
from tokenizers import models, pre_tokenizers, processors, trainers

from videoar import cli, formats, umt5
from videoar.codecs import TinyCodec, TinyCodecConfig
from videoar.flow import unit_noise
from videoar.formats import Origin
from videoar.pipeline import VideoPipeline
from videoar.tokens import to_latents, to_tokens
from videoar.units import Units, parse

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


def _randomise(module: torch.nn.Module, *, scale: float, seed: int = 0) -> Any:
    """Give every weight a value that matters; norms stay near one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return module.eval()


def _diffusers_transformer() -> Any:
    return _randomise(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
        ),
        scale=0.1,
    )


def _tokenizer() -> Any:
    """Byte-level BPE that ends every text, as umT5's does."""
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["a red ball moves left"], trainer)
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
    )


T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The pipeline of diffusers at tiny size."""
    torch.manual_seed(0)
    config = transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu")
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_randomise(transformers.UMT5EncoderModel(config), scale=0.3),
        vae=_randomise(diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1), scale=0.1),
        transformer=_diffusers_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers saves of it, with the text encoder in shards."""
    path = tmp_path_factory.mktemp("wan") / "tiny-wan"
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(path)
    (path / "text_encoder" / "model.safetensors").unlink()
    theirs.text_encoder.save_pretrained(path / "text_encoder", max_shard_size="20KB")
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
    """With the same weights the same velocity: bit for bit in bfloat16, else to 1e-6."""
    reference = diffusers.WanTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype
    )
    ours = Origin.find(folder).transformer().build(dtype=dtype)
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
        expected = reference(sample, given, text, return_dict=False)[0]
        velocity = ours(
            to_tokens(latents, units),
            coords=units.coords,
            sigma=levels / 1000,
            unit=torch.arange(48) if per_token else units.unit,
            text=ours.encode_text(text),
        ).velocity
    found = rearrange(to_latents(velocity, units), "b t c h w -> b c t h w")
    assert expected.abs().max() > 0.2
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_our_names_of_the_original_are_those_of_diffusers() -> None:
    """Two tables written apart: the one here and the converter of diffusers."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from videoar.interop import wan_names

    weights = _diffusers_transformer().state_dict()
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


@pytest.mark.parametrize("splits", [(1, 4, 4), (5, 4), (9,)])
def test_streams_of_the_codec_equal_the_whole(pipe: VideoPipeline, splits: tuple) -> None:
    """Bit for bit, with two streams in turn on one module, and through a saved state."""
    codec, clip = pipe.codec, _clip(9)
    latents = codec.encode(clip)
    encoder, other = codec.stream_encoder(), codec.stream_encoder()
    parts = []
    for part in clip.split(list(splits), dim=1):
        parts.append(encoder(part))
        other(_clip(part.shape[1], seed=3))
        encoder, old = codec.stream_encoder(), encoder
        encoder.load_state_dict(load(save(old.state_dict())))
    assert torch.equal(torch.cat(parts, dim=1), latents)
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
    found = formats.load_codec(tmp_path / "taew2_1.pth")
    assert isinstance(found, TinyCodec)
    assert found.config == TinyCodecConfig()
    latents = torch.randn(1, 2, 16, 4, 4)
    assert torch.equal(found.decode(latents), tiny.decode(latents))
    words = ("--model", str(folder), "--codec", str(tmp_path / "taew2_1.pth"), "--height", "32")
    words = (*words, "--width", "48", "--num-frames", "5", "--num-inference-steps", "1")
    assert cli.main(["generate", "ball", *words, "--out", str(tmp_path / "a.mkv")]) == 0


def test_the_codec_of_wan_2_2_is_refused(tmp_path: Path, folder: Path) -> None:
    """It has other strides; it must not pass for the one of Wan 2.1."""
    shutil.copytree(folder / "vae", tmp_path / "wan" / "vae")
    file = tmp_path / "wan" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 2}))
    with pytest.raises(ValueError, match="patch_size 2, as the codec of Wan 2.2"):
        formats.load_codec(tmp_path / "wan")


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
    theirs: Any, folder: Path, dtype: torch.dtype
) -> None:
    """From the same noise in the same steps: text, guidance, transformer, codec, all of it."""
    reference = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=dtype)
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
    assert pipe.sampling.shift == 3.0
    sigmas = tuple(reference.scheduler.sigmas.tolist())
    decoded, frames = _sampled(pipe, latents=_latents(), sigmas=sigmas, **options)
    assert frames.shape == (1, 9, 32, 32, 3)
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    assert (decoded / 2 + 0.5 - expected).abs().max() <= limit
    pixels = (255 * rearrange(expected, "b t c h w -> b t h w c")).round().numpy()
    assert np.abs(frames - pixels).max() <= 1 + 255 * limit
    moved, _ = _sampled(
        pipe, latents=_latents(), sigmas=sigmas, **options | {"guidance_scale": 1.0}
    )
    assert (decoded - moved).abs().max() > 10 * limit


def test_latents_take_the_place_of_seeded_noise(pipe: VideoPipeline) -> None:
    """Given the noise of a seed, the video is that of the seed, for units in any order."""
    for name in ("full", "chunk:2", "key-detail:3", "cube:1x1x2"):
        units = Units(parse(name), 3, 2, 2)
        noise = [unit_noise((4,), u.index, (len(u.cells), 64)) for u in units]
        latents = to_latents(torch.cat(noise, dim=1), units)
        options = {"units": name, "num_inference_steps": 2, "guidance_scale": 1.0}
        seeded = np.concatenate(list(pipe.generate(["a"], num_frames=9, seeds=[4], **options)))
        given = pipe.generate(["a"], num_frames=9, seeds=[4], latents=latents, **options)
        assert np.array_equal(np.concatenate(list(given)), seeded)


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


def _write_original(folder: Path, theirs: Any) -> Path:
    """Write the files of the original repository, with its names."""
    from videoar.interop import save_wan

    folder.mkdir()
    origin = Origin.find(theirs.source)
    save_wan(folder, origin.transformer())
    vae = {}
    for key, tensor in theirs.vae.state_dict().items():
        vae[_original_codec_name(key, theirs.vae.state_dict())] = tensor
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    text = theirs.text_encoder.state_dict()
    names = {
        "shared.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    for n in range(2):
        block, old = f"encoder.block.{n}.layer", f"blocks.{n}"
        names |= {
            f"{block}.0.layer_norm.weight": f"{old}.norm1.weight",
            f"{block}.1.layer_norm.weight": f"{old}.norm2.weight",
            f"{block}.0.SelfAttention.relative_attention_bias.weight": (
                f"{old}.pos_embedding.embedding.weight"
            ),
            f"{block}.1.DenseReluDense.wi_0.weight": f"{old}.ffn.gate.0.weight",
            f"{block}.1.DenseReluDense.wi_1.weight": f"{old}.ffn.fc1.weight",
            f"{block}.1.DenseReluDense.wo.weight": f"{old}.ffn.fc2.weight",
        }
        for part in "qkvo":
            names[f"{block}.0.SelfAttention.{part}.weight"] = f"{old}.attn.{part}.weight"
    torch.save(
        {names[key]: t for key, t in text.items() if key != "encoder.embed_tokens.weight"},
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    shutil.copytree(theirs.source / "tokenizer", folder / "google" / "umt5-xxl")
    return folder
