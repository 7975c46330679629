"""Checkpoints: what is saved comes back, and what cannot be read says why in one sentence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from tiny import tiny_pipeline
from torch import Tensor, nn

from videoar.checkpoints import checkpoint
from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.checkpoints.convert import convert
from videoar.encoders.text_encoder import TinyPromptEncoder
from videoar.generation.pipeline import VideoPipeline
from videoar.weights import load_component, save_component


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """A config with the kinds of field that configs have."""

    width: int
    stride: tuple[int, int, int] = (4, 8, 8)
    pairs: tuple[tuple[int, float], ...] = ((1, 0.5),)
    scale: float = 1.0
    name: str = "net"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")


class Net(nn.Module):
    """A small module with parameters, a buffer and a frozen parameter."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(config.width, config.width)
        self.frozen = nn.Parameter(torch.ones(config.width), requires_grad=False)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        """Scale a linear map."""
        return self.inner(x) * self.config.scale * self.frozen


CONFIG = NetConfig(width=4, pairs=((2, 0.25), (3, 1.0)), scale=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved component."""
    save_component(tmp_path / "net", Net(CONFIG))
    return tmp_path / "net"


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "DROP"}))


def _sentence(folder: Path) -> str:
    """Return the error that loading gives; it must be one line that names the folder."""
    with pytest.raises(ValueError, match=r".") as caught:
        load_component(folder, Net)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_component_comes_back_with_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Config, weights, precision and outputs survive; otherwise a checkpoint is another model."""
    net = Net(CONFIG).to(dtype)
    save_component(tmp_path, net)
    loaded = load_component(tmp_path, Net)
    assert isinstance(loaded, Net)
    assert loaded.config == CONFIG
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True)
    )
    x = torch.randn(2, 4, dtype=dtype)
    assert torch.equal(net(x), loaded(x))


def test_a_loaded_component_can_be_trained_and_saved_over_its_own_file(folder: Path) -> None:
    """Flags for gradients survive, and the mapped file is replaced and not overwritten."""
    loaded = load_component(folder, Net)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in Net(CONFIG).parameters()
    ]
    loaded(torch.randn(2, 4)).sum().backward()
    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    save_component(folder, loaded)
    for weights in (loaded.state_dict(), load_component(folder, Net).state_dict()):
        assert all(torch.equal(before[key], weights[key]) for key in before)


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    """Loading draws no random numbers; otherwise it would change what is generated after it."""
    state = torch.get_rng_state()
    load_component(folder, Net)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, ["'depth'", "NetConfig", "width, stride"]),
        ({"width": "DROP"}, ["missing", "'width'", "NetConfig"]),
        ({"width": "4"}, ["width", "'4'", "int"]),
        ({"width": True}, ["width", "True", "int"]),
        ({"width": 0}, ["width is 0", "at least 1"]),
        ({"scale": {"factor": 1.0}}, ["scale", "{'factor': 1.0}", "float"]),
        ({"class": "Nett"}, ["'Nett'", "Net"]),
        ({"class": "DROP"}, ["None", "Net"]),
        ({"width": 5}, ["'frozen' in shape (4,)", "(5,)"]),
    ],
)
def test_a_wrong_config_says_what_is_wrong(
    folder: Path, changes: dict[str, object], words: list[str]
) -> None:
    """The sentence names file, field and limit; a silent default would load another model."""
    _edit(folder, **changes)
    text = _sentence(folder)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    """A half-copied checkpoint says which file is missing."""
    (folder / name).unlink()
    assert name in _sentence(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    """Weights cut anywhere are refused with the size; half a model must never run."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file.stat().st_size} bytes" in _sentence(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_corrupt_config_is_refused(folder: Path, content: bytes) -> None:
    """A config that is no JSON object gives a sentence and not a traceback of the parser."""
    (folder / "config.json").write_bytes(content)
    assert "config.json" in _sentence(folder)


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    """Both directions of a mismatch are errors: nothing is dropped, nothing is left at random."""
    larger = nn.ModuleDict({"inner": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    larger.config = CONFIG
    config = (folder / "config.json").read_text()
    save_component(folder, larger)
    (folder / "config.json").write_text(config)
    assert "lacks 2 of the 4 tensors of Net" in _sentence(folder)
    net = Net(CONFIG)
    net.register_buffer("extra", torch.zeros(2))
    save_component(folder, net)
    assert "'extra'" in _sentence(folder)


def _tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    net.config = CONFIG
    return net


def test_shared_tensors_are_refused(tmp_path: Path) -> None:
    """Tied weights would come back untied, so saving them fails and leaves no file."""
    with pytest.raises(RuntimeError, match=r"share memory.*[ab]\.weight.*[ab]\.weight"):
        save_component(tmp_path / "net", _tied())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Noted(TinyPromptEncoder):
    """A part that writes itself, with a further file."""

    def save(self, folder: Path) -> None:
        """Write a net and a note."""
        save_component(folder, Net(CONFIG))
        (folder / "notes.txt").write_text("x")


def _checkpoint(folder: Path, *, overwrite: bool = False, **meta: object) -> Path:
    text = tiny_pipeline().prompt_encoder
    parts = {"transformer": Noted(text.tokenizer, text.encoder)}
    return save_checkpoint(folder, parts, meta, overwrite=overwrite)


def test_a_checkpoint_tells_what_it_is(tmp_path: Path) -> None:
    """The writer's meta comes back beside format, components and versions."""
    folder = _checkpoint(tmp_path / "run" / "toy", seed=3, recipe={"steps": [1, 2]})
    meta = Checkpoint.find(folder).meta
    assert meta["seed"] == 3
    assert meta["recipe"] == {"steps": [1, 2]}
    assert meta["format"] == checkpoint.FORMAT
    assert meta["components"] == ["transformer"]
    assert meta["versions"]["torch"] == torch.__version__
    assert (folder / "transformer" / "notes.txt").read_text() == "x"
    load_component(folder / "transformer", Net)


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """Weights that took days are not lost to a name used twice, and no leftovers stay behind."""
    folder = _checkpoint(tmp_path / "toy", seed=1)
    with pytest.raises(ValueError, match=r"exists already; .* overwrite=True"):
        _checkpoint(folder, seed=2)
    assert Checkpoint.find(folder).meta["seed"] == 1
    _checkpoint(folder, seed=2, overwrite=True)
    assert Checkpoint.find(folder).meta["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    """Even with overwrite, somebody's folder of other files stays as it is."""
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="no checkpoint, so it is left alone"):
        _checkpoint(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """When the second component cannot be written, the old folder is whole and nothing else is."""
    folder = _checkpoint(tmp_path / "toy", seed=1)
    parts = {"transformer": Net(CONFIG), "text": _tied()}
    with pytest.raises(RuntimeError, match="share memory"):
        save_checkpoint(folder, parts, {"seed": 2}, overwrite=True)
    assert Checkpoint.find(folder).meta["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    ("version", "words"),
    [(checkpoint.FORMAT + 1, "pip install --upgrade"), ("1", "integer"), (None, "integer")],
)
def test_a_format_that_cannot_be_read_is_refused(
    tmp_path: Path, version: object, words: str
) -> None:
    """A checkpoint of a later version is refused instead of being read as if it were old."""
    folder = _checkpoint(tmp_path / "toy")
    meta = Checkpoint.find(folder).meta | {"format": version}
    (folder / "videoar.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint.find(folder)
    assert "videoar.json" in str(caught.value)


def test_a_folder_without_meta_is_no_checkpoint(tmp_path: Path) -> None:
    """The sentence says which file makes a checkpoint."""
    with pytest.raises(ValueError, match=r"has no videoar\.json"):
        Checkpoint.find(tmp_path).transformer()


def test_a_local_folder_comes_before_every_other_meaning(tmp_path: Path) -> None:
    """A folder that exists is taken as it is."""
    assert Checkpoint.find(tmp_path).source == tmp_path


def test_a_hub_name_says_how_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder of that name, the command that fetches it; a path is no repository."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download owner/some-model --local-dir some-model"):
        Checkpoint.find("owner/some-model")
    with pytest.raises(ValueError, match=r"no checkpoint is called '\.\./model'"):
        Checkpoint.find("../model")


def test_bundled_names_are_found_and_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundled name resolves to its folder, and a misspelt one is answered with the right one."""
    _checkpoint(tmp_path / "toy")
    monkeypatch.setattr(checkpoint, "assets", lambda: tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert Checkpoint.find("toy").source == tmp_path / "toy"
    with pytest.raises(ValueError, match=r"no checkpoint is called 'tpy' .*did you mean 'toy'"):
        Checkpoint.find("tpy")


def test_footage_hides_no_bundled_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Videos in a folder `robot` are no model; a checkpoint of one's own there is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "robot" / "videos").mkdir(parents=True)
    (tmp_path / "robot" / "settings.json").write_text("{}")
    assert Checkpoint.find("robot").source == checkpoint.assets() / "robot"
    assert Checkpoint.find("./robot").source == Path("robot")
    _checkpoint(tmp_path / "toy")
    assert Checkpoint.find("toy").source == Path("toy")


def test_weights_are_stored_in_less_than_they_compute_in(tmp_path: Path) -> None:
    """Half a package, and no slower: bfloat16 takes a CPU three times as long."""
    pipe = tiny_pipeline()
    whole, half = (pipe.save_pretrained(tmp_path / "whole"), tmp_path / "half")
    convert(Checkpoint.find(whole), half, format="videoar", dtype="bfloat16")

    def computes_in(folder: Path, **options: Any) -> torch.dtype:
        return VideoPipeline.from_pretrained(folder, **options).transformer.proj_out.weight.dtype

    assert computes_in(half) == torch.bfloat16
    about = json.loads((half / "videoar.json").read_text())
    (half / "videoar.json").write_text(json.dumps(about | {"dtype": "float32"}))
    loaded = VideoPipeline.from_pretrained(half)
    for name, tensor in pipe.transformer.state_dict().items():
        kept = loaded.transformer.state_dict()[name]
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept, tensor, atol=0, rtol=2**-8)
    assert computes_in(half, dtype="float16") == torch.float16
    convert(Checkpoint.find(half), tmp_path / "again", format="videoar", dtype="float16")
    assert computes_in(tmp_path / "again") == torch.float16
    (half / "videoar.json").write_text(json.dumps(about | {"dtype": "int3"}))
    with pytest.raises(ValueError, match="cannot run in int3: choose the dtype"):
        VideoPipeline.from_pretrained(half)
