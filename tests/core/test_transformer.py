"""The transformer: Wan's names and numbers, relative positions, one sigma per unit."""

from dataclasses import replace

import pytest
import torch
from reference import to_latents
from tiny import MODEL, tiny_transformer
from torch.utils.flop_counter import FlopCounterMode

from videoar import weights
from videoar.core import transformer
from videoar.core.cache import KVCache
from videoar.core.schemes import parse
from videoar.core.tokens import to_tokens
from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.core.units import Units

BLOCK_NAMES = [
    "scale_shift_table",
    "norm2.weight",
    "norm2.bias",
    *(
        f"attn{n}.{part}.{kind}"
        for n in (1, 2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
        for kind in ("weight", "bias")
    ),
    *(f"attn{n}.norm_{part}.weight" for n in (1, 2) for part in "qk"),
    *(f"ffn.net.{part}.{kind}" for part in ("0.proj", "2") for kind in ("weight", "bias")),
]
# The tensors of diffusers' WanTransformer3DModel with one layer.
WAN_NAMES = [
    "patch_embedding.weight",
    "patch_embedding.bias",
    *(
        f"condition_embedder.{part}.{kind}"
        for part in (
            "time_embedder.linear_1",
            "time_embedder.linear_2",
            "time_proj",
            "text_embedder.linear_1",
            "text_embedder.linear_2",
        )
        for kind in ("weight", "bias")
    ),
    *(f"blocks.0.{name}" for name in BLOCK_NAMES),
    "proj_out.weight",
    "proj_out.bias",
    "scale_shift_table",
]


def _inputs(units: Units, *, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens, coordinates and one sigma per unit."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(batch, len(units.unit), MODEL.token_dim, generator=rng),
        "coords": units.coords,
        "sigma": torch.rand(batch, len(units.sizes), generator=rng),
        "unit": units.unit,
    }


def _text(model: VideoTransformer, batch: int = 2):
    words = torch.randn(batch, 5, MODEL.text_dim, generator=torch.Generator().manual_seed(9))
    return model.encode_text(words)


@torch.no_grad()
def _velocity(model: VideoTransformer, inputs: dict, **options) -> torch.Tensor:
    text = _text(model, len(inputs["tokens"]))
    return model(inputs.pop("tokens"), **inputs, text=text, **options).velocity


def test_names_are_those_of_wan_and_one_more() -> None:
    """Public weights load by name; anything new needs a reason."""
    names = set(VideoTransformer(replace(MODEL, num_layers=1)).state_dict())
    assert names == {*WAN_NAMES, "scale_embedding.weight"}


def test_the_default_config_is_wan_1_3b() -> None:
    """1.419 B parameters, counted from the published table, without building the model."""
    with torch.device("meta"):
        model = VideoTransformer(ModelConfig())
    extra = model.scale_embedding.weight.numel()
    assert model.num_parameters - extra == 1_418_996_800
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 46_440_704


def test_a_new_model_predicts_zero() -> None:
    """Training begins at the mean velocity, not at random ones; levels begin alike."""
    model = VideoTransformer(MODEL)
    units = Units(parse("multiscale:2,1"), 2, 2, 2)
    assert not _velocity(model, _inputs(units)).any()
    assert not model.scale_embedding.weight.any()


def test_only_differences_of_positions_matter() -> None:
    """A stream may run for ever, and a window may move: nothing depends on the place itself."""
    model, units = tiny_transformer(), Units(parse("cube:1x2x2"), 2, 3, 4)
    inputs = _inputs(units)
    moved = {**inputs, "coords": inputs["coords"] + torch.tensor([1000.0, 7.0, 30.0, 0.0])}
    turned = {**inputs, "coords": inputs["coords"] * torch.tensor([2.0, 1.0, 1.0, 1.0])}
    here = _velocity(model, inputs)
    torch.testing.assert_close(_velocity(model, moved), here, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(_velocity(model, turned), here, atol=1e-3)


def test_the_level_of_a_token_matters_once_it_is_trained() -> None:
    """A coarse token at the place of a fine one is something else."""
    model, units = tiny_transformer(), Units(parse("frame"), 1, 2, 2)
    inputs = _inputs(units)
    coarse = {**inputs, "coords": inputs["coords"] + torch.tensor([0.0, 0.0, 0.0, 1.0])}
    assert not torch.allclose(_velocity(model, inputs), _velocity(model, coarse), atol=1e-3)


def test_sigma_per_unit_is_sigma_per_token() -> None:
    """Units are a way to write it: every token is modulated by its own level."""
    model, units = tiny_transformer(), Units(parse("cube:1x2x2"), 2, 3, 4)
    inputs = _inputs(units)
    per_token = {
        **inputs,
        "sigma": inputs["sigma"][:, units.unit],
        "unit": torch.arange(len(units.unit)),
    }
    torch.testing.assert_close(_velocity(model, per_token), _velocity(model, inputs))


def test_one_level_for_all_is_that_level_for_each() -> None:
    """The short path for a single unit computes the same."""
    model, units = tiny_transformer(), Units(parse("frame"), 3, 2, 2)
    inputs = _inputs(units)
    one = {**inputs, "sigma": inputs["sigma"][:, :1], "unit": torch.zeros_like(units.unit)}
    each = {**inputs, "sigma": inputs["sigma"][:, :1].expand(-1, 3)}
    torch.testing.assert_close(_velocity(model, one), _velocity(model, each))


@torch.no_grad()
def test_videos_side_by_side_share_the_row_of_their_prompt() -> None:
    """In training a prompt is encoded once for all its clips."""
    model, inputs = tiny_transformer(), _inputs(Units(parse("frame"), 2, 2, 2), batch=6)
    rows = torch.randn(2, 3, MODEL.text_dim, generator=torch.Generator().manual_seed(0))
    shared, each = (model.encode_text(rows.repeat_interleave(times, 0)) for times in (1, 3))
    expected = model(**inputs, text=each).velocity
    torch.testing.assert_close(model(**inputs, text=shared).velocity, expected)


@pytest.mark.parametrize("level", [1.0, 0.3, 0.01, 0.0])
def test_predicting_clean_data_is_the_same_network_read_differently(level: float) -> None:
    """`velocity = (x - clean) / sigma`, with a floor under sigma: no division by zero at 0."""
    units = Units(parse("frame"), 2, 2, 2)
    as_velocity = tiny_transformer()
    as_clean = tiny_transformer(replace(MODEL, prediction="clean", min_sigma=0.05))
    inputs = _inputs(units) | {"sigma": torch.full((2, 2), level)}
    output = _velocity(as_velocity, dict(inputs))
    expected = (inputs["tokens"] - output) / max(level, 0.05)
    torch.testing.assert_close(_velocity(as_clean, dict(inputs)), expected)
    if level >= 0.05:
        clean = inputs["tokens"] - level * expected
        torch.testing.assert_close(clean, output, atol=1e-5, rtol=1e-5)


def test_tokens_enter_as_the_published_convolution_sees_latents() -> None:
    """Features of a token are ordered as the weights of the patch embedding expect them."""
    model, units = tiny_transformer(), Units(parse("frame"), 2, 3, 4)
    latents = torch.randn(1, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    embedded = model.patch_embedding(latents.transpose(1, 2)).flatten(2).mT
    weight, bias = model.patch_embedding.weight.flatten(1), model.patch_embedding.bias
    ours = torch.nn.functional.linear(to_tokens(latents, units), weight, bias)
    torch.testing.assert_close(ours, embedded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cached", "words"), [(0, 5), (48, 5)])
def test_flops_are_those_that_are_run(cached: int, words: int) -> None:
    """Rates and shares of peak are computed from this figure."""
    config = replace(MODEL, num_heads=4, head_dim=48, ffn_dim=768, num_layers=3)
    model = VideoTransformer(config)
    units = Units(parse("frame"), 1, 8, 8)
    text = _text(model, 1)
    cache = KVCache()
    if cached:
        shape = (config.num_layers, 2, 1, config.num_heads, config.head_dim)
        cache.reserve(cached, shape=shape, like=torch.empty(0))
        cache.commit([(0, cached)])
    inputs = _inputs(units, batch=1)
    tokens = inputs.pop("tokens")
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_kernel, FlopCounterMode(display=False) as counter:
        model(tokens, **inputs, text=text, cache=cache)
    expected = model.flops(64, keys=64 + cached, words=words)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("units_in_pass", [1, 2])
@pytest.mark.parametrize("limit", ["none", "kept", "joined"])
def test_fast_forms_compute_what_the_layers_compute(
    monkeypatch: pytest.MonkeyPatch, limit: str, units_in_pass: int
) -> None:
    """One set of equations: with gradients layers are called; without, matrices made of them.

    So are a modulation for every token, and one for each unit of a wide model.
    """
    if limit == "kept":
        monkeypatch.setattr(transformer, "LARGEST_KEPT", 0)
    if limit == "joined":
        monkeypatch.setattr(weights, "LARGEST_JOINED", 0)
    model = tiny_transformer(replace(MODEL, prediction="clean"))
    units, cache, text = Units(parse("frame"), units_in_pass, 3, 4), KVCache(), _text(model)
    with torch.no_grad():
        first = _inputs(Units(parse("frame"), 1, 3, 4), seed=1)
        model(first.pop("tokens"), **first, text=text, cache=cache)
    cache.commit([(0, 12)])
    inputs = _inputs(units)
    inputs["sigma"] = inputs["sigma"][:1]  # one row for all videos
    tokens = inputs.pop("tokens")
    slow = model(tokens, **inputs, text=text, cache=cache).velocity
    assert slow.requires_grad
    with torch.no_grad():
        fast = [model(tokens, **inputs, text=text, cache=cache).velocity for _ in range(2)]
    assert torch.equal(*fast)  # the second time from what is kept
    torch.testing.assert_close(fast[0], slow.detach(), atol=1e-5, rtol=1e-5)


def test_what_wraps_a_layer_takes_part() -> None:
    """Offloading and low-rank updates hook into layers: a copy of their weights would miss them."""
    model, units = tiny_transformer(), Units(parse("frame"), 1, 3, 4)
    called = []
    for layer in (model.blocks[0].attn1.to_k, model.blocks[1].ffn["net"][2]):
        layer.register_forward_pre_hook(lambda layer, _: called.append(layer))
    inputs, text = _inputs(units), _text(model)
    with torch.no_grad():
        model(inputs.pop("tokens"), **inputs, text=text, cache=KVCache())
    assert called == [model.blocks[0].attn1.to_k, model.blocks[1].ffn["net"][2]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 0), ("num_heads", -1), ("patch", 0), ("head_dim", 4), ("head_dim", 13)],
)
def test_an_impossible_size_is_refused(field: str, value: int) -> None:
    """With its name and the limit, before any weight is made."""
    with pytest.raises(ValueError, match=f"{field} (is )?{value}"):
        replace(MODEL, **{field: value})


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_transformer_is_that_of_diffusers(per_frame: bool) -> None:
    """Same weights, same numbers: public weights mean here what they mean there."""
    diffusers = pytest.importorskip("diffusers")
    config = replace(MODEL, head_dim=32, rope_theta=10000.0, freq_dim=32)
    ours = tiny_transformer(config)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, config.patch, config.patch),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        rope_max_seq_len=64,
    ).eval()
    weights = {k: v for k, v in ours.state_dict().items() if k != "scale_embedding.weight"}
    theirs.load_state_dict(weights, strict=True)
    with torch.no_grad():
        ours.scale_embedding.weight.zero_()
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 4, 6, 8, generator=rng)
    words = torch.randn(2, 5, config.text_dim, generator=rng)
    units = Units(parse("frame"), 3, 3, 4)
    # Small timesteps: theirs are embedded in single precision, ours in double.
    sigma = torch.tensor([[0.0, 0.002, 0.004], [0.001, 0.003, 0.008]])
    timestep = 1000 * sigma
    if per_frame:
        timestep = timestep.repeat_interleave(12, dim=1)
    else:
        sigma = sigma[:, 1:2].expand(-1, 3)
        timestep = timestep[:, 1]
    with torch.no_grad():
        expected = theirs(latents.transpose(1, 2), timestep, words, return_dict=False)[0]
        output = ours(
            to_tokens(latents, units),
            coords=units.coords,
            sigma=sigma,
            unit=units.unit,
            text=ours.encode_text(words),
        )
    velocity = to_latents(output.velocity, units).transpose(1, 2)
    scale = expected.abs().max()
    torch.testing.assert_close(velocity / scale, expected / scale, atol=1e-6, rtol=1e-6)
