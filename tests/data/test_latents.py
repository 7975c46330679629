"""Batches as a pure function of the step, and latents kept in shards."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videoar import data
from videoar.data.batches import Batches
from videoar.data.latents import LatentShards, LatentsInfo, ShardWriter

INFO = LatentsInfo(codec="patch-1", channels=2, stride=(4, 8, 8), fps=16.0)


class _Numbers:
    """Sample i is the number i beside one random number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, indices, rng):
        return {"number": torch.tensor(indices), "chance": torch.from_numpy(rng.random(3))}


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 15),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_epoch_takes_every_sample_once(count, batch_size, seed, epoch):
    """No sample comes twice and only the remainder is dropped; else data is lost."""
    if count < batch_size:
        with pytest.raises(ValueError, match=f"has {count} samples, but one batch takes"):
            Batches(_Numbers(count), batch_size=batch_size, seed=seed)
        return
    batches = Batches(_Numbers(count), batch_size=batch_size, seed=seed)
    steps = count // batch_size
    seen = [
        index
        for step in range(epoch * steps, (epoch + 1) * steps)
        for index in batches.indices(step)
    ]
    assert len(seen) == len(set(seen)) == steps * batch_size
    assert set(seen) <= set(range(count))


def test_epochs_come_in_different_orders():
    """Each epoch is shuffled anew; a fixed order would pair the same samples for ever."""
    batches = Batches(_Numbers(32), batch_size=32, seed=0)
    first, second = batches.indices(0), batches.indices(1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != Batches(_Numbers(32), batch_size=32, seed=1).indices(0)


def test_batch_is_a_function_of_the_step_alone(monkeypatch):
    """Any order of asking, with or without prefetch, gives the same batches; resume rests on it."""
    ahead, alone = (Batches(_Numbers(20), batch_size=3, seed=5) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(data.batches, "AHEAD", 0)
        expected = [alone.batch(step) for step in range(14)]
    for step in [*range(14), 4, 13, 0, 1, 1, 9]:
        batch = ahead.batch(step)
        assert torch.equal(batch["number"], expected[step]["number"])
        assert torch.equal(batch["chance"], expected[step]["chance"])
    assert not torch.equal(expected[0]["chance"], expected[1]["chance"])


def test_error_of_a_dataset_reaches_the_caller():
    """A sample that cannot be read stops the step that needs it, though a thread reads it."""

    class Broken(_Numbers):
        def get(self, indices, rng):
            if 7 in indices:
                raise ValueError("sample 7 cannot be read")
            return super().get(indices, rng)

    batches = Batches(Broken(9), batch_size=3, seed=0)
    bad = next(step for step in range(3) if 7 in batches.indices(step))
    for step in range(bad):
        batches.batch(step)
    with pytest.raises(ValueError, match="sample 7"):
        batches.batch(bad)


def _make_clips(count, *, frames=3):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(frames, 2, 4, 5, generator=rng).half().float() for _ in range(count)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """Several of them come of a few clips."""
    monkeypatch.setattr(data.latents, "MAX_SHARD_CLIPS", 4)


def _write(folder, clips, **options):
    with ShardWriter(folder, info=INFO, **options) as writer:
        for number, clip in enumerate(clips):
            writer.add(clip, captions=[f"clip {number}", f"CLIP {number}"], extra={"id": number})
    return folder


@pytest.mark.parametrize("max_memory_bytes", [0, 1 << 20])
def test_shards_return_what_was_written(tmp_path, monkeypatch, max_memory_bytes):
    """Mapped or in memory, each clip comes back exactly with a caption of its own."""
    monkeypatch.setattr(data.latents, "MAX_MEMORY_BYTES", max_memory_bytes)
    clips = _make_clips(10)
    shards = LatentShards(_write(tmp_path / "set", clips))
    assert len(shards) == 10
    rng = np.random.default_rng(0)
    captions = set()
    for _ in range(8):
        batch = shards.get([9, 2, 5], rng)
        assert torch.equal(batch["latents"], torch.stack([clips[9], clips[2], clips[5]]))
        captions.add(batch["captions"][0])
    assert captions == {"clip 9", "CLIP 9"}
    assert [clip["extra"]["id"] for clip in shards.clips] == list(range(10))


def test_tokenizer_replaces_captions(tmp_path):
    """A dataset with a tokenizer hands out token ids that belong to the clips asked for."""
    shards = LatentShards(
        _write(tmp_path / "set", _make_clips(3)),
        tokenize=lambda texts: torch.tensor([[int(text.split()[1])] for text in texts]),
    )
    batch = shards.get([2, 0], np.random.default_rng(0))
    assert batch["text"].tolist() == [[2], [0]]
    assert "captions" not in batch


def test_folder_knows_its_statistics(tmp_path):
    """Mean and deviation per channel are those of all clips; training at a wrong scale fails."""
    clips = [clip * 3 + 1 for clip in _make_clips(6)]
    info = LatentShards(_write(tmp_path / "set", clips, dtype=torch.bfloat16)).info
    values = torch.stack([clip.bfloat16().float() for clip in clips])
    assert info.mean == pytest.approx(values.mean((0, 1, 3, 4)).tolist(), abs=1e-5)
    assert info.std == pytest.approx(values.std((0, 1, 3, 4), correction=0).tolist(), abs=1e-5)
    assert (info.codec, info.stride, info.fps) == ("patch-1", (4, 8, 8), 16.0)


def test_clips_of_two_sizes_share_a_folder_but_no_batch(tmp_path):
    """Sizes are stored apart and each is read; a batch of both is none."""
    clips = [*_make_clips(3), *_make_clips(2, frames=5)]
    shards = LatentShards(_write(tmp_path / "set", clips))
    rng = np.random.default_rng(0)
    by_id = {clip["extra"]["id"]: row for row, clip in enumerate(shards.clips)}
    assert torch.equal(shards.get([by_id[4]], rng)["latents"][0], clips[4])
    with pytest.raises(RuntimeError, match="equal size"):
        shards.get([by_id[0], by_id[4]], rng)


def test_writer_refuses_what_cannot_be_read_back(tmp_path):
    """Wrong channels, overflow and a full folder are errors at once, not at training time."""
    folder = _write(tmp_path / "set", _make_clips(1))
    with pytest.raises(ValueError, match="not empty"):
        ShardWriter(folder, info=INFO)
    writer = ShardWriter(tmp_path / "other", info=INFO)
    with pytest.raises(AssertionError, match="another codec"):
        writer.add(torch.zeros(1, 3, 4, 5), captions=["x"])
    with pytest.raises(ValueError, match=r"clip 0 is not finite as torch\.float16, .* 1e\+06"):
        writer.add(torch.full((1, 2, 4, 5), 1e6), captions=["x"])


def test_unfinished_folder_is_not_read(tmp_path):
    """Writing that failed half-way leaves no folder that looks complete."""
    clips = [*_make_clips(1), torch.full((1, 2, 4, 5), 1e6)]
    with pytest.raises(ValueError, match="not finite"):
        _write(tmp_path / "set", clips)
    with pytest.raises(ValueError, match=r"no folder .* with latents\.json"):
        LatentShards(tmp_path / "set")


def test_damaged_folder_gives_one_clear_sentence(tmp_path):
    """A damaged shard or index is named with the remedy before training starts."""
    folder = _write(tmp_path / "set", _make_clips(6))
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing, cut short"):
        LatentShards(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing, cut short"):
        LatentShards(folder)
    shard.write_bytes(whole)
    index = folder / "index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[:2], lines[2][:30]]))
    with pytest.raises(ValueError, match=r"line 3 of .*index\.jsonl"):
        LatentShards(folder)
    index.write_text(json.dumps(json.loads(lines[0]) | {"row": 4}))
    with pytest.raises(ValueError, match="names row 4 of shard-00000"):
        LatentShards(folder)
