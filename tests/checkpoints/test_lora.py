"""Low-rank updates as trainers write them: names, strengths, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_transformer

from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.checkpoints.lora import merge_lora

Tensors = dict[str, torch.Tensor]
RANK = 4
Q = "blocks.0.attn1.to_q"
PEFT = f"base_model.model.{Q}"
KOHYA = "lora_unet_blocks_0_self_attn_q"


def _base() -> Tensors:
    return tiny_transformer().state_dict()


def _sides(rows: int = 24, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(RANK, columns, generator=rng), torch.randn(rows, RANK, generator=rng)


def _peft(stem: str = PEFT) -> Tensors:
    return dict(zip((f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"), _sides(), strict=True))


def _kohya(stem: str = KOHYA, alpha: float | None = 8.0) -> Tensors:
    names = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")
    tensors = dict(zip(names, _sides(), strict=True))
    return tensors if alpha is None else tensors | {f"{stem}.alpha": torch.tensor(alpha)}


def _merged(
    folder: Path, tensors: Tensors, header: dict[str, str] | None = None, **config: Any
) -> Tensors:
    """Merge a file with this header, and with a configuration of PEFT beside it if it has any."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata=header)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return merge_lora(_base(), folder / "adapter_model.safetensors")


def _check(merged: Tensors, added: Tensors) -> None:
    """Compare with sums in float64; what is not named stays bit for bit."""
    for key, tensor in _base().items():
        if key in added:
            expected = (tensor.double() + added[key]).float()
            torch.testing.assert_close(merged[key], expected, atol=1e-5, rtol=1e-5)
            assert not torch.equal(merged[key], tensor)
        else:
            assert torch.equal(merged[key], tensor)


def _product(scale: float) -> Tensors:
    down, up = _sides()
    return {f"{Q}.weight": scale * (up.double() @ down.double())}


DIFFUSERS = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
TWICE: dict[str, tuple[Tensors, dict[str, str] | None, dict[str, Any]]] = {
    "config": (_peft(), None, {"r": 4, "lora_alpha": 8}),
    "config of the layer": (
        _peft(),
        None,
        {"r": 9, "lora_alpha": 1, "rank_pattern": {Q: 4}, "alpha_pattern": {"attn1.to_q": 8}},
    ),
    "root of the rank": (_peft(), None, {"r": 4, "lora_alpha": 4, "use_rslora": True}),
    "header of kohya": (_kohya(alpha=None), {"ss_network_alpha": "8.0", "ss_network_dim": "4"}, {}),
    "resized": (_kohya(), {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, {}),
    "header of diffusers": (_peft(f"transformer.{Q}"), DIFFUSERS, {}),
    "tensor": (_kohya(), None, {}),
    "all of them": (_kohya(Q), DIFFUSERS | {"ss_network_alpha": "8"}, {"r": 4, "lora_alpha": 8}),
}


@pytest.mark.parametrize("place", TWICE)
def test_alpha_counts_wherever_it_is_written(tmp_path: Path, place: str) -> None:
    """Alpha 8 over rank 4 is twice B A; else an update acts at half of what was trained."""
    tensors, header, config = TWICE[place]
    _check(_merged(tmp_path, tensors, header, **config), _product(2.0))


@pytest.mark.parametrize("header", [None, {"ss_network_alpha": "None"}, {"ss_network_alpha": "0"}])
def test_without_a_number_alpha_is_the_rank(tmp_path: Path, header: dict[str, str] | None) -> None:
    """As LongLive is published, and as kohya means None and 0."""
    _check(_merged(tmp_path, _kohya(alpha=None), header), _product(1.0))


def test_alpha_is_not_counted_twice(tmp_path: Path) -> None:
    """What musubi-tuner converts holds alpha in its sides, and still states it in the header."""
    header = {"ss_network_alpha": "8.0", "ss_network_dim": "4"}
    _check(_merged(tmp_path, _peft(f"diffusion_model.{Q}"), header), _product(1.0))


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # takes biases for shards
def test_what_peft_writes_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    """Patterns, biases and the root of the rank: the sum is that of `merge_and_unload`."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "net.2"],
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={r"blocks\.1\.attn2\.to_q": 3, "^blocks.0.attn2.to_q": 5},
        use_rslora=True,
        lora_bias=True,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(tiny_transformer(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        merged = merge_lora(_base(), source)
        assert merged.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "stem",
    [
        KOHYA,
        "lora_unet__blocks_0_self_attn_q",
        "lora_unet_blocks_0_attn1_to_q",
        "lycoris_blocks_0_self_attn_q",
        "diffusion_model.blocks.0.self_attn.q",
        "model._fsdp_wrapped_module.blocks.0.self_attn.q",
    ],
)
def test_names_with_underscores_are_those_of_the_model(tmp_path: Path, stem: str) -> None:
    """What kohya's and musubi's trainers write does belong to the model."""
    _check(_merged(tmp_path, _kohya(stem)), _product(2.0))


def test_every_layer_is_found_by_each_naming(tmp_path: Path) -> None:
    """Also those outside self-attention, with a bias, or of a convolution."""
    names = {
        "ffn.net.0.proj": ("blocks.1", "ffn.0"),
        "attn2.to_out.0": ("blocks.1", "cross_attn.o"),
        "condition_embedder.time_proj": ("", "time_projection.1"),
        "patch_embedding": ("", "patch_embedding"),
    }
    base = _base()
    for ours, (block, theirs) in names.items():
        key = ".".join(filter(None, (block, ours, "weight")))
        down, up = _sides(len(base[key]), base[key][0].numel())
        added = {key: 2.0 * (up.double() @ down.double()).reshape(base[key].shape)}
        if base[key].ndim > 2:
            down, up = down.reshape(RANK, *base[key].shape[1:]), up[:, :, None, None, None]
        for name in (ours, theirs):
            dotted = ".".join(filter(None, (block, name)))
            for stem in (dotted, "lora_unet_" + dotted.replace(".", "_")):
                tensors = {"lora_down.weight": down, "lora_up.weight": up}
                tensors["alpha"] = torch.tensor(8.0)
                found = _merged(tmp_path, {f"{stem}.{k}": v for k, v in tensors.items()})
                _check(found, added)


def test_plain_additions_are_added(tmp_path: Path) -> None:
    """LoRAs of distilled models carry norms, biases and modulation whole, without alpha."""
    rng, base = torch.Generator().manual_seed(4), _base()
    names = {
        "blocks.0.self_attn.q.diff_b": f"{Q}.bias",
        "blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.diff_m": "scale_shift_table",
    }
    added = {key: torch.randn(base[key].shape, generator=rng) for key in names.values()}
    tensors = {f"diffusion_model.{name}": added[key] for name, key in names.items()}
    found = _merged(tmp_path, tensors | _kohya("diffusion_model.blocks.0.self_attn.q"))
    _check(found, added | _product(2.0))


def test_several_are_merged_each_at_its_strength(tmp_path: Path) -> None:
    """Sides, biases and plain additions are scaled alike; a name that holds `=` is a name."""
    norm = "blocks.0.attn1.norm_q"
    one, two = tmp_path / "one.safetensors", tmp_path / "two=2.safetensors"
    save_file(_kohya(), one)
    save_file({f"{Q}.diff_b": torch.ones(24), f"{norm}.diff": torch.ones(24)}, two)
    save_checkpoint(tmp_path / "base", {"transformer": tiny_transformer()}, {})
    found = Checkpoint.find(tmp_path / "base", lora=[f"{one}=0.5", f"{two}=2", two]).transformer()
    added = {f"{Q}.bias": 3 * torch.ones(24), f"{norm}.weight": 3 * torch.ones(24)}
    _check(found.weights, added | _product(1.0))
    names = ("0.5 times one.safetensors", "2 times two=2.safetensors", "two=2.safetensors")
    assert found.format == " with ".join(("videoar", *names))
    assert len(Checkpoint.find(tmp_path / "base", lora=one).lora) == 1


@pytest.mark.parametrize("strength", ["", "x", "nan", "1,5"])
def test_a_strength_is_a_number(tmp_path: Path, strength: str) -> None:
    """And a file that is not there is called so."""
    save_checkpoint(tmp_path / "base", {"transformer": tiny_transformer()}, {})
    save_file(_kohya(), tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=f"gives '{strength}', but a number is needed for"):
        Checkpoint.find(tmp_path / "base", lora=f"{tmp_path}/one.safetensors={strength}")
    found = Checkpoint.find(tmp_path / "base", lora=f"{tmp_path}/two.safetensors={strength}")
    with pytest.raises(ValueError, match="there is no file"):
        found.transformer()


ONE = torch.ones(24)
WRONG: dict[str, tuple[Tensors, dict[str, str] | None, dict[str, Any], str]] = {
    "two alphas": (_kohya(), None, {"lora_alpha": 4}, "2 times by its tensor alpha, but 1|1 times"),
    "two places": (_peft(), DIFFUSERS, {"lora_alpha": 4}, "1 times by .*_config.json, but 2 times"),
    "another rank": (_peft(), None, {"r": 8, "lora_alpha": 8}, "the rank 8, but .* with rank 4"),
    "words for alpha": (_peft(), None, {"lora_alpha": "x"}, "gives 'x', but a number is needed"),
    "no number": (_peft(), None, {"lora_alpha": 10**400}, "but a number is needed"),
    "no alpha": (_peft(), None, {"r": 4}, "gives None, but a number is needed"),
    "many alphas": (_kohya(alpha=None) | {f"{KOHYA}.alpha": ONE}, None, {}, "a number is needed"),
    "resized, no tensor": (_kohya(alpha=None), {"ss_network_alpha": "Dynamic"}, {}, "'Dynamic'"),
    "odd header": (_peft(), {"lora_adapter_metadata": "[]"}, {}, "is no JSON object"),
    "odd pattern": (_peft(), None, {"lora_alpha": 8, "alpha_pattern": {"(": 1}}, "can be read"),
    "odd patterns": (_peft(), None, {"lora_alpha": 8, "rank_pattern": 3}, "can be read"),
    "DoRA of PEFT": (_peft() | {f"{PEFT}.lora_magnitude_vector": ONE}, None, {}, "DoRA"),
    "DoRA of kohya": (_kohya() | {f"{KOHYA}.dora_scale": ONE}, None, {}, "DoRA"),
    "DoRA by config": (_peft(), None, {"lora_alpha": 8, "use_dora": True}, "use_dora True"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": ONE}, None, {}, "LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": ONE}, None, {}, "LoKr"),
    "LoHa by config": (_peft(), None, {"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    "two adapters": (_peft() | _peft(Q), None, {}, "gives A of 'blocks.0.attn1.to_q' twice"),
    "two names": (
        _peft() | {f"{PEFT}.lora_A.other.weight": _sides()[0]},
        None,
        {},
        "gives A of .* twice",
    ),
    "two namings": (_peft() | _kohya(), None, {}, "gives A of 'blocks.0.attn1.to_q' twice"),
    "a norm without weights": ({"blocks.0.norm1.diff": ONE}, None, {}, "no LoRA of this model"),
    "text encoder": (_kohya() | _kohya("lora_te_q"), None, {}, "such as 'lora_te_q"),
    "no bias": ({"blocks.0.self_attn.norm_q.diff_b": ONE}, None, {}, "there is no such tensor"),
    "a long bias": ({"blocks.0.self_attn.q.diff_b": torch.ones(9)}, None, {}, "its shape is"),
    "no rank": (
        {f"{Q}.lora_A.weight": torch.ones(0, 24), f"{Q}.lora_B.weight": torch.ones(24, 0)},
        None,
        {},
        "no LoRA of this model",
    ),
    "no matrices": (
        {f"{Q}.lora_A.weight": ONE, f"{Q}.lora_B.weight": 2 * ONE},
        None,
        {},
        "no LoRA",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """One sentence that names what is wrong; never a merge at another strength."""
    tensors, header, config, words = WRONG[case]
    with pytest.raises(ValueError, match=words) as caught:
        _merged(tmp_path, tensors, header, **config)
    assert "\n" not in str(caught.value)
