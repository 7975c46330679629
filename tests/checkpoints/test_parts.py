"""Parts that checkpoints share: stored once, loaded as if each had its own."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from videoar.checkpoints import checkpoint
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli.main import main
from videoar.generation.pipeline import VideoPipeline


def _name(folder: Path, parts: object) -> None:
    file = folder / "videoar.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parts": parts}))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint with all of its parts."""
    return tiny_pipeline(seed=1).save_pretrained(tmp_path / "whole")


@pytest.fixture
def sharing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without its codec, which a bundled checkpoint holds."""
    bundle = tmp_path / "bundle"
    shutil.copytree(whole, bundle / "first")
    tiny_pipeline(seed=2).save_pretrained(bundle / "third")
    monkeypatch.setattr(checkpoint, "assets", lambda: bundle)
    shutil.copytree(whole, bundle / "second")
    shutil.rmtree(bundle / "second" / "codec")
    _name(bundle / "second", {"codec": "first"})
    return bundle / "second"


def _same(first: VideoPipeline, second: VideoPipeline) -> bool:
    parts = [(p.transformer, p.codec, p.prompt_encoder.encoder) for p in (first, second)]
    pairs = zip(*([part.state_dict() for part in each] for each in parts), strict=True)
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    )


def test_the_package_holds_nothing_twice() -> None:
    """Every file of weights is there once: megabytes that all users download."""
    assets = checkpoint.assets()
    files = [file.read_bytes() for file in assets.rglob("*.safetensors")]
    assert len({hashlib.sha256(content).digest() for content in files}) == len(files) >= 5
    codecs = [Checkpoint.find(name).codec() for name in ("toy", "toy-base")]
    assert codecs[0].fingerprint() == codecs[1].fingerprint()


def test_a_named_part_is_loaded_as_its_own(sharing: Path, whole: Path, capsys) -> None:
    """By its folder and by its bundled name; `info` lists it, so nobody thinks it is missing."""
    expected = VideoPipeline.from_pretrained(whole)
    for name in (sharing, "second"):
        assert _same(VideoPipeline.from_pretrained(name), expected)
        assert Checkpoint.find(name).parts().keys() == {"text", "codec"}
    assert main(["info", "second"]) == 0
    assert "codec        TinyCodec" in capsys.readouterr().out


def test_it_is_saved_again_whole(sharing: Path, whole: Path, tmp_path: Path) -> None:
    """By `save_pretrained` and `convert`: what is passed on needs nothing beside it."""
    VideoPipeline.from_pretrained(sharing).save_pretrained(tmp_path / "saved")
    assert main(["convert", str(sharing), str(tmp_path / "converted")]) == 0
    shutil.rmtree(sharing.parent)
    for name in ("saved", "converted"):
        found = Checkpoint.find(tmp_path / name)
        assert "parts" not in found.meta
        assert found.meta["components"] == ["codec", "text", "transformer"]
        assert _same(
            VideoPipeline.from_pretrained(tmp_path / name), VideoPipeline.from_pretrained(whole)
        )


def test_a_fingerprint_covers_named_parts(sharing: Path, whole: Path) -> None:
    """It is that of the whole; it changes with the part, else old scores pass for those of now."""
    before = Checkpoint.find(sharing).fingerprint()
    assert before == Checkpoint.find(whole).fingerprint()
    shutil.rmtree(sharing.parent / "first" / "transformer")  # nobody's part
    assert Checkpoint.find(sharing).fingerprint() == before
    file = sharing.parent / "first" / "codec" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    assert Checkpoint.find(sharing).fingerprint() != before


def test_a_checkpoint_may_carry_another_with_its_parts(sharing: Path, whole: Path) -> None:
    """A path is one below the folder, and text encoders are shared as codecs are."""
    shutil.move(sharing.parent / "first", sharing / "inner")
    shutil.rmtree(sharing / "text")
    _name(sharing, {"codec": "inner", "text": "inner"})
    assert _same(VideoPipeline.from_pretrained(sharing), VideoPipeline.from_pretrained(whole))


def test_the_current_folder_does_not_matter(
    sharing: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that happens to be called so is not taken: it would make other videos, elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny_pipeline(seed=3).save_pretrained("first")
    assert _same(VideoPipeline.from_pretrained(sharing), VideoPipeline.from_pretrained(whole))


def test_what_is_given_comes_first(sharing: Path, whole: Path) -> None:
    """A part of its own, `base` and `codec` need no name, so a name that leads nowhere is none."""
    _name(sharing, {"codec": "nowhere"})
    expected = VideoPipeline.from_pretrained(whole)
    assert _same(VideoPipeline.from_pretrained(sharing, codec=whole), expected)
    assert _same(VideoPipeline.from_pretrained(sharing, base=whole), expected)
    shutil.copytree(whole / "codec", sharing / "codec")
    assert _same(VideoPipeline.from_pretrained(sharing), expected)


def _cut(folder: Path) -> None:
    file = folder.parent / "first" / "codec" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _lose(folder: Path) -> None:
    shutil.rmtree(folder.parent / "first" / "codec")


def _circle(folder: Path) -> None:
    _lose(folder)
    _name(folder.parent / "first", {"codec": "second"})


def _newer(folder: Path) -> None:
    file = folder.parent / "first" / "videoar.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))


def _parts(parts: object) -> Callable[[Path], None]:
    return lambda folder: _name(folder, parts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "first/codec/model.safetensors"),
        (_lose, "takes its codec from 'first', unless base names another: it has none of its"),
        (_circle, "takes its codec from 'first', unless base names another: it has none of its"),
        (_newer, "takes its codec from 'first'.* gives format 2"),
        (_parts({"codec": "second"}), "from 'second', .*: it has none of its own"),
        (_parts({"codec": "first-2"}), "from 'first-2', .* no checkpoint .* did you mean 'first'"),
        (_parts({"codec": "some/model"}), "from 'some/model', .*`hf download some/model"),
        (_parts({"codec": "../first"}), "no checkpoint is called '../first'"),
        (_parts({"codec": "/tmp"}), "no checkpoint is called '/tmp'"),
        (_parts({"codec": ""}), "it has none of its own"),
        (_parts({"codec": 3}), "gives parts {'codec': 3}, but only text and codec may be"),
        (_parts({"transformer": "first"}), "but only text and codec may be those of another"),
        (_parts("first"), "gives parts 'first', but only text and codec may be"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info", "convert"])
def test_a_part_that_cannot_be_had_is_said_in_one_sentence(
    sharing: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    command: str,
    change: Callable[[Path], None],
    words: str,
) -> None:
    """Missing, damaged, in a circle, outside, or no name: it is not left out in silence."""
    change(sharing)
    asked = {
        "generate": ["a ball", "--model", str(sharing), "--out", str(tmp_path / "a.mkv")],
        "info": [str(sharing)],
        "convert": [str(sharing), str(tmp_path / "converted")],
    }
    assert main([command, *asked[command]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("videoar: error: ")
    assert error.count("\n") == 1
    assert re.search(words, error), error
    assert not {"a.mkv", "converted"} & {path.name for path in tmp_path.iterdir()}
