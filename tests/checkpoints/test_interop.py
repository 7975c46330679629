"""Foreign weights: every public layout comes in, goes out, and what is wrong with one is said."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, tiny_transformer

from videoar import weights
from videoar.checkpoints import convert
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli import main
from videoar.core.transformer import VideoTransformer
from videoar.weights import build_empty

Tensors = dict[str, torch.Tensor]
HEAD = MODEL.head_dim
# The original's names, written down from its model and not from the table under test.
ORIGINAL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    **{
        f"blocks.{n}.{old}": f"blocks.{n}.{new}"
        for n in range(MODEL.num_layers)
        for old, new in {
            "norm3": "norm2",
            "self_attn.q": "attn1.to_q",
            "self_attn.k": "attn1.to_k",
            "self_attn.v": "attn1.to_v",
            "self_attn.o": "attn1.to_out.0",
            "self_attn.norm_q": "attn1.norm_q",
            "self_attn.norm_k": "attn1.norm_k",
            "cross_attn.q": "attn2.to_q",
            "cross_attn.k": "attn2.to_k",
            "cross_attn.v": "attn2.to_v",
            "cross_attn.o": "attn2.to_out.0",
            "cross_attn.norm_q": "attn2.norm_q",
            "cross_attn.norm_k": "attn2.norm_k",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
        }.items()
    },
}


def _ours(seed: int = 0) -> Tensors:
    weights = tiny_transformer(seed=seed).state_dict()
    del weights["scale_embedding.weight"]
    return weights


def _original(weights: Tensors) -> Tensors:
    """Name tensors as Wan-Video/Wan2.1 does."""
    names = {
        "scale_shift_table": "head.modulation",
        **{
            f"blocks.{n}.scale_shift_table": f"blocks.{n}.modulation"
            for n in range(MODEL.num_layers)
        },
    }
    for old, new in ORIGINAL.items():
        names |= {f"{new}.{kind}": f"{old}.{kind}" for kind in ("weight", "bias")}
    return {names[key]: tensor for key, tensor in weights.items()}


def _prefixed(prefix: str, weights: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in weights.items()}


def _save_shards(folder: Path, weights: Tensors, config: dict[str, Any]) -> Path:
    """Write a folder of two shards, their index and a config."""
    folder.mkdir()
    stem, keys = "diffusion_pytorch_model", sorted(weights)
    files = {key: f"{stem}-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(keys)}
    for file in sorted(set(files.values())):
        save_file({k: weights[k].contiguous() for k in keys if files[k] == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": MODEL.num_heads,
    "attention_head_dim": HEAD,
    "in_channels": MODEL.latent_channels,
    "out_channels": MODEL.latent_channels,
    "text_dim": MODEL.text_dim,
    "freq_dim": MODEL.freq_dim,
    "ffn_dim": MODEL.ffn_dim,
    "num_layers": MODEL.num_layers,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "patch_size": [1, 2, 2],
    "eps": 1e-6,
}
WAN_CONFIG = {"_class_name": "WanModel", "dim": MODEL.hidden_size, "num_heads": MODEL.num_heads}


def _pt(tree: Callable[[Tensors], dict[str, Any]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(tree(_original(_ours())), folder / "model.pt")
        return folder / "model.pt"

    return write


def _other(prefix: str) -> Tensors:
    """Weights that must not be taken."""
    return _prefixed(prefix, _original(_ours(seed=7)))


def _safetensors(folder: Path) -> Path:
    save_file(_prefixed("model.", _original(_ours())), folder / "krea.safetensors")
    return folder / "krea.safetensors"


def _linear_patches(prefix: str) -> Callable[[Tensors], Tensors]:
    def change(weights: Tensors) -> Tensors:
        patch = weights["patch_embedding.weight"].flatten(1)
        return _prefixed(prefix, weights | {"patch_embedding.weight": patch})

    return change


def _legacy(folder: Path) -> Path:
    """As torch wrote before 1.6: no zip archive, so it cannot be mapped."""
    file, weights = folder / "old.pth", _original(_ours())
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    return file


def _folder(names: Callable[[Tensors], Tensors], config: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: _save_shards(folder / "model", names(_ours()), config)


def _inside(folder: Path) -> Path:
    """A folder of diffusers with its `transformer/`."""
    (folder / "pipe").mkdir()
    (folder / "pipe" / "model_index.json").write_text("{}")
    _save_shards(folder / "pipe" / "transformer", _ours(), DIFFUSERS_CONFIG)
    return folder / "pipe"


FSDP = "model._fsdp_wrapped_module."
LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "self-forcing": (
        _pt(lambda w: {"generator": _other("model."), "generator_ema": _prefixed("model.", w)}),
        "entry generator_ema",
    ),
    "self-forcing-training": (
        _pt(lambda w: {"generator": _prefixed("model.", w), "critic": _other("model.")}),
        "entry generator",
    ),
    "causvid": (_pt(lambda w: {"generator": _prefixed("model.", w)}), "entry generator"),
    "causal-forcing": (
        _pt(lambda w: {"generator": _other("model."), "generator_ema": _prefixed(FSDP, w)}),
        "entry generator_ema",
    ),
    "longlive-base": (_pt(lambda w: {"generator": _prefixed("model.", w)}), "original Wan"),
    "nested": (_pt(lambda w: {"state_dict": {"model": w}}), "entry state_dict, entry model"),
    "compiled": (_pt(lambda w: {"model": _prefixed("module._orig_mod.", w)}), "entry model"),
    "krea": (_safetensors, "original Wan names, file"),
    "rcm": (_pt(_linear_patches("net.")), "original Wan names, file"),
    "rcm-ema": (
        _pt(lambda w: _other("net.") | _linear_patches("net_ema.")(w)),
        "original Wan names, file",
    ),
    "legacy": (_legacy, "original Wan names, file"),
    "wan": (_folder(_original, WAN_CONFIG), "original Wan names, folder"),
    "diffusers": (_folder(dict, DIFFUSERS_CONFIG), "diffusers names, folder"),
    "diffusers-pipeline": (_inside, "diffusers names, folder"),
}


def _base(folder: Path) -> str:
    """A folder that states the size of the heads, which a bare file does not."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(WAN_CONFIG))
    return str(folder / "base")


def _origin(source: Path | str, lora: Path | None = None) -> Checkpoint:
    return Checkpoint.find(source, base=_base(Path(source).parent), lora=lora)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_loads_with_its_bits(tmp_path: Path, layout: str) -> None:
    """Unwrapped, renamed and reshaped, it is the model that was written, and the words say how."""
    write, words = LAYOUTS[layout]
    found = _origin(write(tmp_path)).transformer()
    expected = _ours()
    assert words in found.format
    assert replace(found.config, rope_theta=MODEL.rope_theta) == MODEL
    assert found.weights.keys() == {*expected, "scale_embedding.weight"}
    assert all(torch.equal(found.weights[key], expected[key]) for key in expected)
    assert not found.weights["scale_embedding.weight"].any()
    model = found.build()
    assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)


def test_an_entry_can_be_chosen(tmp_path: Path) -> None:
    """The chunk-wise demo of Causal-Forcing uses the weights that are not averaged."""
    file = LAYOUTS["self-forcing"][0](tmp_path)
    found = _origin(f"{file}#generator").transformer()
    assert torch.equal(found.weights["proj_out.bias"], _ours(seed=7)["proj_out.bias"])
    with pytest.raises(ValueError, match="no entry 'critic'; it has generator, generator_ema"):
        _origin(f"{file}#critic").transformer()


@pytest.mark.parametrize("layout", ["self-forcing", "krea", "wan"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped(tmp_path: Path, layout: str) -> None:
    """Loading 28 GB must not take 28 GB before the first tensor is used."""
    path = LAYOUTS[layout][0](tmp_path)
    found = _origin(path).transformer()
    assert str(path) in Path("/proc/self/maps").read_text()
    assert found.weights


def test_narrow_weights_keep_the_modulation_wide(tmp_path: Path) -> None:
    """As in diffusers and in the original: what the noise level acts through stays in float32."""
    found = _origin(LAYOUTS["krea"][0](tmp_path)).transformer()
    model = found.build(dtype=torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {
        name.split(".")[-2] if "norm2" in name else name.rpartition(".")[0] for name in wide
    } == {
        "norm2",
        "",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "blocks.0",
        "blocks.1",
    }
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert torch.equal(model.scale_shift_table, _ours()["scale_shift_table"])


# ---------------------------------------------------------------- low-rank updates


def _lora(naming: str, rank: int = 3) -> tuple[Tensors, Tensors]:
    """Updates of two layers under PEFT's or another naming, and what they add up to."""
    rng, size = torch.Generator().manual_seed(5), MODEL.hidden_size
    tensors, added = {}, {}
    for old, new in (("self_attn.q", "attn1.to_q"), ("cross_attn.o", "attn2.to_out.0")):
        down = torch.randn(rank, size, generator=rng)
        up = torch.randn(size, rank, generator=rng)
        stem = f"blocks.1.{old}"
        if naming == "peft":
            tensors[f"base_model.model.{stem}.lora_A.default.weight"] = down
            tensors[f"base_model.model.{stem}.lora_B.default.weight"] = up
            scale = 1.0
        else:
            tensors[f"diffusion_model.{stem}.lora_down.weight"] = down
            tensors[f"diffusion_model.{stem}.lora_up.weight"] = up
            tensors[f"diffusion_model.{stem}.alpha"] = torch.tensor(6.0)
            scale = 2.0
        added[f"blocks.1.{new}.weight"] = scale * (up.double() @ down.double())
    return tensors, added


@pytest.mark.parametrize("naming", ["peft", "alpha"])
def test_low_rank_updates_are_merged(tmp_path: Path, naming: str) -> None:
    """LongLive is a base and updates: the sum is what was trained, and nothing else changes."""
    tensors, added = _lora(naming)
    torch.save({"generator_lora": tensors}, tmp_path / "lora.pt")
    base = LAYOUTS["longlive-base"][0](tmp_path)
    merged = _origin(base, tmp_path / "lora.pt").transformer().weights
    for key, tensor in _ours().items():
        expected = (tensor.double() + added.get(key, 0.0)).float()
        torch.testing.assert_close(merged[key], expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(
        merged["blocks.1.attn1.to_q.weight"], _ours()["blocks.1.attn1.to_q.weight"]
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blocks.9.self_attn.q.lora_A.weight": torch.ones(2, 24)}, "no LoRA of this model"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)}, "no LoRA of this model"),
        ({"blocks.0.self_attn.q.weight": torch.ones(24, 24)}, "no LoRA of this model"),
        (
            {
                "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 8),
                "blocks.0.self_attn.q.lora_B.weight": torch.ones(24, 2),
            },
            "its shape is",
        ),
    ],
)
def test_updates_of_another_model_are_refused(tmp_path: Path, tensors: Tensors, words: str) -> None:
    """An update that does not fit must not be left out in silence."""
    save_file(tensors, tmp_path / "lora.safetensors")
    base = LAYOUTS["krea"][0](tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        _origin(base, tmp_path / "lora.safetensors").transformer()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what cannot be read


class _Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def _code(folder: Path) -> Path:
    torch.save({"generator": {"x": _Code(f"touch {folder}/ran")}}, folder / "evil.pt")
    return folder / "evil.pt"


def _cut(layout: str, keep: int = -100) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = LAYOUTS[layout][0](folder)
        file.write_bytes(file.read_bytes()[:keep])
        return file

    return write


def _garbage(folder: Path) -> Path:
    (folder / "noise.pt").write_bytes(bytes(range(256)) * 9)
    return folder / "noise.pt"


def _lost_shard(folder: Path) -> Path:
    path = LAYOUTS["wan"][0](folder)
    (path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    return path


def _changed(change: Callable[[Tensors], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        weights = _original(_ours())
        change(weights)
        torch.save(weights, folder / "model.pt")
        return folder / "model.pt"

    return write


def _saved(tree: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(tree, folder / "model.pt")
        return folder / "model.pt"

    return write


def _unlike_wan(folder: Path) -> Path:
    return _save_shards(folder / "model", _ours(), DIFFUSERS_CONFIG | {"qk_norm": "rms_norm"})


def _wide(folder: Path) -> Path:
    return _changed(lambda w: w.update({"patch_embedding.bias": torch.ones(30)}))(folder)


def _no_weights(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _two_files(folder: Path) -> Path:
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, folder / f"{name}.safetensors")
    return folder


BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "code": (_code, ("could run code", "safetensors")),
    "truncated safetensors": (_cut("krea"), ("truncated or damaged", "bytes")),
    "truncated pt": (_cut("causvid"), ("truncated or damaged", "bytes")),
    "pt cut at its beginning": (_cut("causvid", 40), ("truncated or damaged",)),
    "truncated legacy": (_cut("legacy"), ("truncated or damaged",)),
    "empty": (_cut("causvid", 0), ("is empty (0 bytes)",)),
    "garbage": (_garbage, ("truncated or damaged",)),
    "lost shard": (_lost_shard, ("lacks 1 of 2 shards", "00002-of-00002")),
    "two models": (_two_files, ("2 files *.safetensors and no index",)),
    "no weights": (_no_weights, ("no videoar.json, no model_index.json and no weights",)),
    "wrong shape": (
        _changed(lambda w: w.update({"blocks.1.ffn.0.bias": torch.ones(7)})),
        ("'blocks.1.ffn.net.0.proj.bias' in shape (7,)", "(48,)"),
    ),
    "missing and unexpected": (
        _changed(lambda w: (w.pop("head.head.bias"), w.update({"mystery.proj": torch.ones(2)}))),
        ("lacks 1 of the", "'proj_out.bias'", "has 1 that", "'mystery.proj'"),
    ),
    "a layer is missing": (
        _changed(lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.0.")]),
        ("lacks",),
    ),
    "another model": (
        _saved({"state_dict": {"encoder.0.weight": torch.ones(2)}}),
        ("lacks", "has 1 that", "'encoder.0.weight'", "'blocks.*.attn1.to_q.weight' x 30"),
    ),
    "no tensors": (_saved({"epoch": 3}), ("no tensors at its top, only epoch",)),
    "a list": (_saved([1, 2]), ("holds a list",)),
    "other heads": (_wide, ("30 channels", "heads of 12", "as base")),
    "not as Wan": (_unlike_wan, ("qk_norm", "'rms_norm_across_heads'")),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    """Through the command: exit code 2, one line that says why, nothing run or written."""
    write, words = BAD[case]
    source = write(tmp_path)
    base = _base(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["convert", str(source), str(tmp_path / "target"), "--base", base]) == 2
    error = capsys.readouterr().err
    assert error.startswith("videoar: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- conversion


def _bits(folder: Path) -> Tensors:
    return _origin(folder).transformer().weights


@pytest.mark.parametrize("layout", ["self-forcing", "rcm", "diffusers-pipeline"])
def test_a_round_through_all_formats_keeps_every_bit(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture
) -> None:
    """Ours, diffusers, the original and ours again: what is written is what was read."""
    source = LAYOUTS[layout][0](tmp_path)
    base = _base(tmp_path)
    expected = _bits(source)
    for number, name in enumerate(("videoar", "diffusers", "wan", "videoar", "wan", "diffusers")):
        target = tmp_path / f"{number}-{name}"
        words = ["convert", str(source), str(target), "--format", name, "--base", base]
        words += ["--preset", "self-forcing"] if name == "videoar" else []
        assert main.main(words) == 0
        found = _bits(target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        source = target
    assert "every tensor was matched" in capsys.readouterr().out


def test_stored_precisions_survive_conversion(tmp_path: Path) -> None:
    """A file in bfloat16 with a table in float32 comes out so; `--dtype` narrows what may be."""
    weights = {key: tensor.bfloat16() for key, tensor in _original(_ours()).items()}
    weights["head.modulation"] = weights["head.modulation"].float()
    save_file(weights, tmp_path / "mixed.safetensors")
    checkpoint = _origin(tmp_path / "mixed.safetensors")
    convert.convert(checkpoint, tmp_path / "wan", format="wan")
    written = load_file(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    assert {key: tensor.dtype for key, tensor in written.items()} == {
        key: tensor.dtype for key, tensor in weights.items()
    }
    convert.convert(checkpoint, tmp_path / "half", format="wan", dtype="float16")
    half = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert half["blocks.0.ffn.0.weight"].dtype == torch.float16
    assert half["blocks.0.modulation"].dtype == torch.float32


def test_a_preset_is_written_into_the_checkpoint(tmp_path: Path) -> None:
    """Who converts once need not say again how the family is sampled."""
    checkpoint = _origin(LAYOUTS["causvid"][0](tmp_path))
    convert.convert(checkpoint, tmp_path / "ours", format="videoar", preset="causvid")
    ours = Checkpoint.find(tmp_path / "ours")
    assert ours.meta["origin"] == "original Wan names, entry generator, file"
    found = ours.sampling()
    assert (found["step"], tuple(found["sigmas"])) == ("renoise", (1.0, 0.757, 0.522, 0.0))
    assert (found["height"], found["width"]) == (480, 832)


def test_what_others_cannot_run_is_not_written_for_them(tmp_path: Path) -> None:
    """The toy predicts clean data and has trained levels: elsewhere it would show noise."""
    for name in ("diffusers", "wan"):
        with pytest.raises(ValueError, match=r"prediction clean .* the format videoar"):
            convert.convert(Checkpoint.find("toy"), tmp_path / name, format=name)
    assert not list(tmp_path.iterdir())


def test_nothing_that_exists_is_lost(tmp_path: Path) -> None:
    """A target is replaced when asked, and only if it is a checkpoint of that format."""
    checkpoint = _origin(LAYOUTS["krea"][0](tmp_path))
    for name in ("videoar", "diffusers", "wan"):
        target, how = tmp_path / name, {} if name == "wan" else {"preset": "self-forcing"}
        convert.convert(checkpoint, target, format=name, **how)
        with pytest.raises(ValueError, match="exists already"):
            convert.convert(checkpoint, target, format=name, **how)
        convert.convert(checkpoint, target, format=name, overwrite=True, **how)
        (target / "thesis.txt").write_text("years")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="left alone"):
        convert.convert(checkpoint, tmp_path / "other", format="wan", overwrite=True)


def test_info_names_the_format_and_forecasts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before anything is computed: what it is, its precision, its size, and what a video needs."""
    file = LAYOUTS["self-forcing"][0](tmp_path)
    words = ("--preset", "self-forcing", "--dtype", "bfloat16", "--seconds", "5")
    assert main.main(["info", str(file), "--base", _base(tmp_path), *words]) == 0
    out = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in _ours().values()) + 5 * MODEL.hidden_size
    for part in ("original Wan names, entry generator_ema, file", "float32", f"{count:,}"):
        assert part in out
    # 480 x 832 are 1560 tokens per latent frame; the last chunk of three reads the 18 before it.
    token = 2 * MODEL.num_layers * MODEL.hidden_size * 2 / 2**20
    held = f"{21 * 1560 * token:.2f} MiB, {18 * 1560} tokens and {3 * 1560} of a pass"
    assert held in out


# ---------------------------------------------------------------- offloading


def test_offloaded_matrices_visit_the_device_and_come_back() -> None:
    """The device holds one at a time. The meta device stands in for one that is too small."""
    model = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights.offload(model, model.blocks, "meta")
    with torch.inference_mode():
        text = model.encode_text(torch.ones(1, 3, MODEL.text_dim, device="meta"))
        output = model(
            torch.ones(1, 4, MODEL.token_dim, device="meta"),
            coords=torch.zeros(4, 4, device="meta"),
            sigma=torch.ones(1, 1, device="meta"),
            unit=torch.zeros(4, dtype=torch.long, device="meta"),
            text=text,
        )
    assert output.velocity.is_meta
    hosted = {name for name, p in model.named_parameters() if not p.is_meta}
    assert hosted == {
        f"blocks.{n}.{part}.{kind}"
        for n in range(MODEL.num_layers)
        for kind in ("weight", "bias")
        for part in (
            *(f"attn{a}.to_{p}" for a in (1, 2) for p in ("q", "k", "v", "out.0")),
            "ffn.net.0.proj",
            "ffn.net.2",
        )
    }
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in hosted)


def test_an_offloaded_model_computes_the_same() -> None:
    """Where the weights wait has no part in the result."""
    plain, moved = tiny_transformer(), tiny_transformer()
    weights.offload(moved, moved.blocks, "cpu")
    inputs = {
        "coords": torch.zeros(4, 4),
        "sigma": torch.full((1, 1), 0.5),
        "unit": torch.zeros(4, dtype=torch.long),
    }
    results = []
    for model in (plain, moved):
        with torch.inference_mode():
            text = model.encode_text(torch.ones(1, 3, MODEL.text_dim))
            results.append(model(torch.ones(1, 4, MODEL.token_dim), text=text, **inputs).velocity)
    assert torch.equal(*results)


def test_the_largest_model_is_described_without_memory() -> None:
    """14 B parameters are laid out on the meta device, and their count is Wan's."""
    config = replace(MODEL, latent_channels=16, num_layers=40, num_heads=40, head_dim=128)
    config = replace(config, ffn_dim=13824, text_dim=4096, freq_dim=256)
    model = build_empty(VideoTransformer, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert 14.2e9 < model.num_parameters < 14.4e9
