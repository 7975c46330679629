"""umT5, the text encoder of Wan: loaded when it is needed, its embeddings kept on disk.

transformers is imported where it is used, and nowhere else.
"""

import contextlib
import hashlib
import html
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from videoar.checkpoint import assign_weights, build_empty, library, read_json, read_safetensors
from videoar.text import Rows
from videoar.weights import Weights, read_weights

MAX_TOKENS = 512
# Original names of umT5 and those of transformers, in a block.
_T5 = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
TIED = ("encoder.embed_tokens.weight", "shared.weight")
# Where text encoder and tokenizer lie: in a folder of ours, of diffusers, of the original.
TEXTS = {
    "text/encoder": "text/tokenizer",
    "text_encoder": "tokenizer",
    "models_t5*.pth": "google/umt5-xxl",
}


class UMT5PromptEncoder:
    """Wan's text encoder: loaded when a prompt is new, and freed after that.

    Embeddings are kept on disk by the hash of prompt and encoder, so that 11 GB of weights are read
    once per prompt and not once per video.
    """

    def __init__(
        self,
        encoder: Path,
        tokenizer: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        self.encoder, self.tokenizer, self.device = encoder, tokenizer, device
        # T5 overflows in float16.
        self.dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self.cache = cache or Path.home() / ".cache" / "videoar" / "text"
        with _said(tokenizer / "tokenizer.json"):
            self._words = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._words.no_padding()
        self._words.no_truncation()

    @classmethod
    def find(cls, folder: Path, **options: Any) -> "UMT5PromptEncoder":
        """Find the text encoder of a folder of any format."""
        for encoders, tokenizer in TEXTS.items():
            for encoder in sorted(folder.glob(encoders)) if folder.is_dir() else ():
                if (folder / tokenizer / "tokenizer.json").is_file():
                    return cls(encoder, folder / tokenizer, **options)
        raise ValueError(
            f"{folder} has no text encoder with its tokenizer; pass a Wan folder that has them, "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, as --base"
        )

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Rows:
        """Encode prompts to 512 rows each; those behind the end of a prompt are zero."""
        cleaned = [clean(prompt) for prompt in prompts]
        files = {prompt: self._file(prompt) for prompt in cleaned}
        rows = {prompt: _read_rows(file) for prompt, file in files.items()}
        if new := [prompt for prompt, found in rows.items() if found is None]:
            ids = {prompt: self._ids(prompt) for prompt in new}
            model = self.load().to(self.device)
            for prompt in new:
                # One at a time: the same bits whatever else is in the batch.
                inputs = torch.tensor([ids[prompt]], device=self.device)
                found = model(inputs).last_hidden_state[0].cpu()
                rows[prompt] = found
                _write_rows(files[prompt], found)
        padded = [
            torch.cat([found, found.new_zeros(MAX_TOKENS - len(found), found.shape[1])])
            for found in map(rows.get, cleaned)
            if found is not None
        ]
        return torch.stack(padded)

    def fingerprint(self) -> str:
        """Name what the rows mean: the sizes of the encoder's files, and its words."""
        parts = self.encoder.iterdir() if self.encoder.is_dir() else [self.encoder]
        about = repr(sorted((part.name, part.stat().st_size) for part in parts)).encode()
        about += (self.tokenizer / "tokenizer.json").read_bytes()
        return f"umT5-{hashlib.sha256(about).hexdigest()[:12]}"

    def _ids(self, prompt: str) -> list[int]:
        ids = self._words.encode(prompt).ids
        if len(ids) > MAX_TOKENS:
            raise ValueError(
                f"The prompt that begins with {prompt[:40]!r} has {len(ids)} tokens, "
                f"but the limit is {MAX_TOKENS}: shorten it."
            )
        return ids

    def _file(self, prompt: str) -> Path:
        parts = self.encoder.iterdir() if self.encoder.is_dir() else [self.encoder]
        stats = sorted((part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts)
        key = json.dumps([prompt, self._ids(prompt), stats, str(self.dtype)])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def weights(self) -> Weights:
        """Return the tensors under the names of transformers, mapped and not yet in memory."""
        weights = read_weights(self.encoder)
        if "token_embedding.weight" in weights:
            weights = _t5_names(weights)
        # Tied: files hold one of them, or both.
        for name, other in (TIED, TIED[::-1]):
            if other in weights:
                weights.setdefault(name, weights[other])
        return weights

    def load(self) -> Any:
        """Build the encoder; its tensors stay mapped unless another `dtype` was asked for."""
        transformers, weights = library("transformers"), self.weights()
        if self.encoder.is_dir():
            stated = read_json(self.encoder / "config.json")
        else:
            stated = _t5_config(weights, self.encoder)
        with _said(self.encoder):
            model = build_empty(transformers.UMT5EncoderModel, transformers.UMT5Config(**stated))
        if self.dtype is not None:
            weights = {key: tensor.to(self.dtype) for key, tensor in weights.items()}
        assign_weights(model, weights, file=self.encoder)
        return model.eval()

    def save(self, folder: Path) -> None:
        """Write encoder and tokenizer into sub-folders."""
        self.save_as(folder / "encoder", folder / "tokenizer")

    def save_as(self, encoder: Path, tokenizer: Path) -> None:
        """Copy encoder and tokenizer; the original's file becomes a folder of transformers."""
        # Loaded in any case: that shows whether it is whole.
        model = UMT5PromptEncoder(self.encoder, self.tokenizer).load()
        shutil.copytree(self.tokenizer, tokenizer)
        if self.encoder.is_dir():
            shutil.copytree(self.encoder, encoder)
        else:
            model.save_pretrained(encoder)

    def tensors(self) -> Sequence[Tensor]:
        """Return the parameters, mapped: for counting."""
        return [tensor for name, tensor in self.weights().items() if name != TIED[0]]


@contextlib.contextmanager
def _said(file: Path) -> Iterator[None]:
    """Say in one sentence what a library finds wrong with a file."""
    try:
        yield
    except Exception as error:  # tokenizers raises no narrower kind
        raise ValueError(f"{file} cannot be used ({error}); copy or download it again") from error


def clean(prompt: str) -> str:
    """Clean a prompt as Wan does: broken Unicode, HTML entities, white space."""
    fixed = library("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()


def _read_rows(file: Path) -> Tensor | None:
    # A damaged file is as good as none: it is written anew.
    with contextlib.suppress(ValueError, OSError):
        return read_safetensors(file)["rows"]
    return None


def _write_rows(file: Path, rows: Tensor) -> None:
    with contextlib.suppress(OSError):  # no disk to write to is no reason to stop
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"rows": rows.contiguous()}, partial)
        os.replace(partial, file)


def _t5_names(weights: Weights) -> Weights:
    renamed = {}
    for key, tensor in weights.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key)
        name = {"token_embedding.weight": TIED[1], "norm.weight": "encoder.final_layer_norm.weight"}
        if match:
            renamed[f"encoder.block.{match[1]}.{_T5.get(match[2], match[2])}.weight"] = tensor
        else:
            renamed[name.get(key, key)] = tensor
    return renamed


def _t5_config(weights: Weights, file: Path) -> dict[str, Any]:
    """Read the sizes of an encoder from its shapes."""
    block = "encoder.block.0.layer."
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.block")}
    try:
        buckets, heads = weights[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape
        inner, size = weights[f"{block}0.SelfAttention.q.weight"].shape
        ffn = len(weights[f"{block}1.DenseReluDense.wi_0.weight"])
    except KeyError as error:
        raise ValueError(f"{file} is no umT5 encoder: it lacks {error}; use Wan's") from error
    return {
        "vocab_size": len(weights[TIED[1]]),
        "d_model": size,
        "d_kv": inner // heads,
        "d_ff": ffn,
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }
