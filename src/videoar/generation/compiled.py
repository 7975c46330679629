"""Compiled passes: the blocks of a transformer by `torch.compile`, attention as it is.

What is cached, and the mask, are hidden from the compiler: it sees tokens, places, modulation and
text, so it compiles a block twice (before and behind attention) for every shape of those, and never
for a longer cache. Beyond `torch._dynamo.config.recompile_limit` shapes, torch says that it
computes others uncompiled.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoar.checks import explained, import_extra
from videoar.core.attention import Mask
from videoar.core.cache import KVCache
from videoar.core.transformer import Output, VideoTransformer

# Set before the compiler is imported, which `torch.compiler` does: it would set its own, in /tmp.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "videoar" / "compiled"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))


class Hidden(KVCache):
    """A cache and a mask that the compiler does not look into."""

    def __init__(self, cache: KVCache, mask: Mask | None):
        self.cache, self.mask = cache, mask
        self.reserve, self.keep = cache.reserve, cache.keep

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Let the tokens of a pass read what they may."""
        return self.cache.attend(layer, query, key, value, self.mask)


class Compiled:
    """A transformer whose blocks are compiled."""

    def __init__(self, network: VideoTransformer):
        self.network, self.config = network, network.config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compiled) and self.network is other.network

    def __call__(self, tokens: Tensor, *, mask: Mask | None, cache: KVCache, **inputs) -> Output:
        return self.network(tokens=tokens, mask=None, cache=Hidden(cache, mask), **inputs)


def compile_blocks(transformer: VideoTransformer, device: torch.device | str) -> None:
    """Compile blocks in place when they are first called; other processes find what was compiled.

    Raises:
        ValueError: what torch needs to compile is missing.
    """
    from torch._inductor import cpp_builder, exc

    if torch.device(device).type == "cuda":
        import_extra("triton", "compile needs Triton: `pip install triton`, or leave it out ({})")
    needed = "compile needs a compiler of C++, such as g++: install it, or leave compile out"
    with explained(needed, exc.InvalidCxxCompiler):
        cpp_builder.get_cpp_compiler()
    # The rotation is complex, and stays a kernel of its own.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for")
    for block in transformer.blocks:
        block.compile(dynamic=False)
