"""Files as people have them: with more than weights, of other kinds, or something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import MODEL, tiny_transformer

from videoar.checkpoints.wan import read_transformer
from videoar.checks import Note
from videoar.cli import main
from videoar.weights import read_json, read_weights

Tensors = dict[str, torch.Tensor]
CONFIG = {"dim": MODEL.hidden_size, "num_heads": MODEL.num_heads}


def _model(folder: Path, extra: Tensors | None = None) -> Path:
    """Write the transformer, with other tensors beside it, and a config that states its heads."""
    whole = {**tiny_transformer().state_dict(), **(extra or {})}
    save_file(whole, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


EXTRA = {
    "blocks.0.attn1.norm_q._extra_state": torch.zeros(3, dtype=torch.uint8),
    "blocks.1.attn1.norm_q._extra_state": torch.zeros(3, dtype=torch.uint8),
    "freqs": torch.zeros(2, 3),
    "rope.freqs_cos": torch.zeros(2, 3),
    "accum_image_sample_counter": torch.zeros((), dtype=torch.int64),
    "model_sampling.sigmas": torch.zeros(1000),
    "pos_embedder.seq": torch.zeros(128),
    "scaled_fp8": torch.zeros(2),
}


def test_what_is_no_weight_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """States of libraries and counters of trainers change no video; in Python it is a warning."""
    folder = _model(tmp_path, EXTRA)
    with pytest.warns(Note, match=r"left out .*'blocks\.\*\.attn1\.norm_q\._extra_state' x 2"):
        found = read_transformer(folder, base=folder)
    expected = tiny_transformer().state_dict()
    assert found.weights.keys() == expected.keys()
    assert main.main(["convert", str(folder), str(tmp_path / "x"), "--preset", "wan"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("videoar: ")
    assert all(f"'{name}'" in line for name in EXTRA if "_extra_state" not in name)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_what_it_was_scaled_from(tmp_path: Path, name: str, rows: bool) -> None:
    """The float8 alone would be another model: it is multiplied by the scale beside it."""
    exact, key = tiny_transformer().state_dict(), "blocks.0.ffn.net.2"
    full = exact[f"{key}.weight"]
    scale = (full.abs().amax(1) if rows else full.abs().amax()) / 448
    narrow = (full / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
    extra = {f"{key}.weight": narrow, f"{key}.{name}": scale, f"{key}.scale_input": torch.ones(())}
    with pytest.warns(Note) as said:
        found = read_weights(_model(tmp_path, extra))
    assert found.keys() == exact.keys()
    assert found[f"{key}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(found[f"{key}.weight"].float(), full, rtol=0.07, atol=2e-3)
    assert [str(note.message).count("1 matrices are scaled float8") for note in said] == [0, 1]


QUANTISED = {
    "int8": {"blocks.0.ffn.net.2.weight": torch.zeros(16, 48, dtype=torch.int8)},
    "uint8": {"blocks.0.ffn.net.2.weight.absmax": torch.zeros(4, 4, dtype=torch.uint8)},
    "scale": {"blocks.0.ffn.net.2.scale_weight": torch.zeros(3)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_in_a_sentence(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    """Integers would be taken for weights, or end deep inside of torch."""
    folder = _model(tmp_path, QUANTISED[kind])
    assert main.main(["info", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is quantised" in error
    assert "use the file in bfloat16" in error
    assert error.count("\n") == 1


MISTAKEN = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "pointer of git-LFS",
    b"\n<!DOCTYPE html><html></html>": "page of a web site",
    b"<HTML></HTML>": "page of a web site",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "page of a web site",
    b"Entry not found": "page of a web site",
    b"GGUF" + bytes(4000): "GGUF",
}


@pytest.mark.parametrize("content", MISTAKEN, ids=MISTAKEN.values())
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "config.json"])
def test_what_lies_in_place_of_a_file_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes
) -> None:
    """`Truncated or damaged` sends people to download the same page again."""
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=MISTAKEN[content]):
        (read_json if name.endswith("json") else read_weights)(file)


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    """Safetensors named .bin are read; a pickle named .safetensors says how to name it."""
    tensors = {"x": torch.ones(2)}
    save_file(tensors, tmp_path / "a.bin")
    assert torch.equal(read_weights(tmp_path / "a.bin")["x"], tensors["x"])
    for zipped in (True, False):
        file = tmp_path / "b.safetensors"
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"is a pickle.*end in \.pt"):
            read_weights(file)


def _save(tensors: Tensors, file: Path) -> None:
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)


def _sharded(folder: Path, stem: str, suffix: str, index: str) -> None:
    files = [f"{stem}-0000{k}-of-00002.{suffix}" for k in (1, 2)]
    for key, file in zip("ab", files, strict=True):
        _save({key: torch.ones(1)}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))


def _bin_shards(folder: Path) -> None:
    _sharded(folder, "pytorch_model", "bin", "pytorch_model.bin.index.json")
    _save({"a": torch.zeros(1)}, folder / "training_args.bin")


def _one_bin(folder: Path) -> None:
    _save({"a": torch.ones(1), "b": torch.ones(1)}, folder / "diffusion_pytorch_model.bin")


def _fp16_beside(folder: Path) -> None:
    for stem, value in (("m", 1.0), ("m.fp16", 0.0), ("m.non_ema", 0.0)):
        tensors = {key: torch.full((1,), value) for key in "ab"}
        _save(tensors, folder / f"{stem}.safetensors")
    _sharded(folder, "m.bf16", "safetensors", "m.safetensors.index.bf16.json")


def _fp16_beside_shards(folder: Path) -> None:
    _sharded(folder, "m", "safetensors", "m.safetensors.index.json")
    _save({"a": torch.zeros(1)}, folder / "m.fp16.safetensors")


def _fp16_shards_alone(folder: Path) -> None:
    _sharded(folder, "m.fp16", "safetensors", "m.safetensors.index.fp16.json")


def _bin_beside_safetensors(folder: Path) -> None:
    _save({"a": torch.ones(1), "b": torch.ones(1)}, folder / "model.safetensors")
    _save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


FOLDERS = (
    _bin_shards,
    _one_bin,
    _fp16_beside,
    _fp16_beside_shards,
    _fp16_shards_alone,
    _bin_beside_safetensors,
)


@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_a_folder_gives_the_files_that_diffusers_takes(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """Safetensors before pickles, plain files before variants, and of shards all."""
    write(tmp_path)
    found = read_weights(tmp_path)
    assert sorted(found) == ["a", "b"]
    assert all(bool(tensor.all()) for tensor in found.values())


def test_code_in_a_shard_is_not_run(tmp_path: Path) -> None:
    """Shards of pickles are read as files of pickles are: tensors alone."""
    _sharded(tmp_path, "pytorch_model", "bin", "pytorch_model.bin.index.json")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path)
