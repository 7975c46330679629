"""Blocks by `torch.compile`: the same stream within rounding, in a known number of graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from videoar.generation.compiled import compile_blocks
from videoar.generation.pipeline import VideoPipeline

# In a process of its own: the checks of shapes while testing cannot be compiled.
PROGRAM = """
import json
from dataclasses import replace
import torch
from tiny import tiny_pipeline
from videoar.generation.compiled import compile_blocks

pipe = tiny_pipeline()
pipe.progress = False
how = {"num_frames": 61, "units": "frame", "output_type": "latent"}
plain = pipe("a red ball", **how)
compile_blocks(pipe.transformer, "cpu")
seen = torch._dynamo.utils.counters
for graphs in (False, True):
    latents = replace(pipe, compiled=True, graphs=graphs)("a red ball", **how)
    difference = float((latents - plain).abs().max() / plain.abs().max())
    hits = seen["inductor"]["fxgraph_cache_hit"]
    print(json.dumps([difference, seen["stats"]["unique_graphs"], hits]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_stream_is_the_stream_within_rounding(tmp_path: Path) -> None:
    """A block is compiled twice for each of two shapes: alone, and with what the cache is due.

    However much is cached and for all layers; once more for recordings, whose tensors have other
    strides. Another process finds all that was compiled. Latents differ by 2e-7 of the largest, so
    1e-5 is a fault.
    """
    paths = [str(Path(__file__).parents[k]) for k in (1, 2)]
    places = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": f"{paths[0]}:{paths[1]}/src"}
    for again in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={k: v for k, v in os.environ.items() if "INDUCTOR" not in k} | places,
            capture_output=True,
            text=True,
            check=False,
        )
        if "compile needs" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert not done.returncode, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for (difference, compiled, found), most in zip(lines, (4, 8), strict=True):
            assert difference < 1e-5
            assert 4 <= compiled <= most
            assert found == (compiled if again else 0)


def test_a_missing_compiler_is_named(monkeypatch) -> None:
    """One sentence before anything is computed: what is missing, and what to leave out."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"compile needs a compiler of C\+\+, such as g\+\+: inst"):
        compile_blocks(tiny_pipeline().transformer, "cpu")


def test_what_moves_weights_excludes_what_needs_them_in_place() -> None:
    """Weights that visit the card have another address at every visit."""
    for name in ("graphs", "compile"):
        with pytest.raises(ValueError, match="offload is True: use it, or graphs and compile"):
            VideoPipeline.from_pretrained("toy", offload=True, **{name: True})
