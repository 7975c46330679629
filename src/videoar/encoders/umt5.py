"""umT5, the text encoder of Wan: loaded when it is needed, its embeddings kept on disk.

transformers is imported where it is used, and nowhere else.
"""

import contextlib
import functools
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoar.checks import explained
from videoar.encoders.text_encoder import Rows, check_length, check_text
from videoar.files import contents
from videoar.weights import (
    CONFIG,
    Weights,
    assign_weights,
    build_empty,
    library,
    read_json,
    read_safetensors,
    read_weights,
    usable,
    write_safetensors,
)

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
    once per prompt and not once per video. In training they are kept with the latents.
    """

    trainable = tokenize = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __init__(self, encoder: Path, tokenizer: Path) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.cache = Path.home() / ".cache" / "videoar" / "text"
        with usable(tokenizer / "tokenizer.json"):
            self._words = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._words.no_padding()
        self._words.no_truncation()

    @classmethod
    def find(cls, folder: Path, *, device: Any = None, dtype: Any = None) -> "UMT5PromptEncoder":
        """Find the text encoder of a folder of any format."""
        for encoders, tokenizer in TEXTS.items():
            for encoder in sorted(folder.glob(encoders)) if folder.is_dir() else ():
                if (folder / tokenizer / "tokenizer.json").is_file():
                    found = cls(encoder, folder / tokenizer)
                    found.to(device, dtype)
                    return found
        raise ValueError(
            f"{folder} has no text encoder with its tokenizer; pass a Wan folder that has them, "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, as base"
        )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.device = device or self.device
        # T5 overflows in float16.
        self.dtype = torch.bfloat16 if dtype == torch.float16 else dtype or self.dtype

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Rows:
        """Encode prompts to 512 rows each; those behind the end of a prompt are zero."""
        cleaned = [clean(prompt) for prompt in prompts]
        encode = self._words.encode
        ids = {p: check_length(encode(p).ids, p, limit=MAX_TOKENS) for p in cleaned}
        files = {prompt: self._file(prompt, row) for prompt, row in ids.items()}
        rows: dict[str, Tensor] = {}
        for prompt, file in files.items():
            # A damaged file is as good as none: it is written anew.
            with contextlib.suppress(ValueError, OSError):
                rows[prompt] = read_safetensors(file)["rows"]
        if new := [prompt for prompt in files if prompt not in rows]:
            model = self.load().to(self.device)
            for prompt in new:
                # One at a time: the same bits whatever else is in the batch.
                inputs = torch.tensor([ids[prompt]], device=self.device)
                rows[prompt] = model(inputs).last_hidden_state[0].cpu()
                with contextlib.suppress(OSError):  # no disk to write to is no reason to stop
                    self.cache.mkdir(parents=True, exist_ok=True)
                    write_safetensors(files[prompt], {"rows": rows[prompt].contiguous()})
        found = [rows[prompt] for prompt in cleaned]
        return torch.stack([F.pad(row, (0, 0, 0, MAX_TOKENS - len(row))) for row in found])

    def fingerprint(self) -> str:
        """Name what the rows mean: a hash of the encoder's files and its words."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = sorted(self.encoder.iterdir()) if self.encoder.is_dir() else [self.encoder]
        digest = hashlib.sha256()
        for part in (*filter(Path.is_file, parts), self.tokenizer / "tokenizer.json"):
            digest.update(contents(part))
        return f"umT5-{digest.hexdigest()[:12]}"

    def _file(self, prompt: str, ids: list[int]) -> Path:
        key = json.dumps([prompt, ids, self._fingerprint, str(self.dtype)])
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
        whole = self.encoder.is_dir()
        stated = read_json(self.encoder / CONFIG) if whole else _t5_config(weights, self.encoder)
        with usable(self.encoder):
            model = build_empty(transformers.UMT5EncoderModel, transformers.UMT5Config(**stated))
        if self.dtype is not None:
            weights = {key: tensor.to(self.dtype) for key, tensor in weights.items()}
        return assign_weights(model, weights, file=self.encoder).eval()

    def too_long(self, captions: set[str]) -> str:
        return ""  # `encode` takes no longer ones

    def with_trained(self, module: nn.Module) -> "UMT5PromptEncoder":
        return self

    def save(self, folder: Path, encoder: str = "encoder") -> None:
        """Copy encoder and tokenizer; the original's file becomes a folder of transformers."""
        # Loaded in any case: that shows whether it is whole.
        model = UMT5PromptEncoder(self.encoder, self.tokenizer).load()
        shutil.copytree(self.tokenizer, folder / "tokenizer")
        if self.encoder.is_dir():
            shutil.copytree(self.encoder, folder / encoder)
        else:
            model.save_pretrained(folder / encoder)

    def tensors(self) -> list[Tensor]:
        """Return the parameters, mapped: for counting."""
        return [tensor for name, tensor in self.weights().items() if name != TIED[0]]


def clean(prompt: str) -> str:
    """Clean a prompt as Wan does: broken Unicode, HTML entities, white space."""
    fixed = library("ftfy").fix_text(check_text(prompt))
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()


def _t5_names(weights: Weights) -> Weights:
    names = {"token_embedding.weight": TIED[1], "norm.weight": "encoder.final_layer_norm.weight"}
    for key in weights:
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key):
            names[key] = f"encoder.block.{match[1]}.{_T5.get(match[2], match[2])}.weight"
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def _t5_config(weights: Weights, file: Path) -> dict[str, Any]:
    """Read the sizes of an encoder from its shapes."""
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.block")}
    parts = ("pos_embedding.embedding", "attn.q", "ffn.gate.0")
    with explained(f"{file} is no umT5 encoder: it lacks {{}}; use Wan's", KeyError):
        bias, query, gate = (weights[f"encoder.block.0.{_T5[part]}.weight"] for part in parts)
    return {
        "vocab_size": len(weights[TIED[1]]),
        "d_model": query.shape[1],
        "d_kv": len(query) // bias.shape[1],
        "d_ff": len(gate),
        "num_layers": len(layers),
        "num_heads": bias.shape[1],
        "relative_attention_num_buckets": len(bias),
        "feed_forward_proj": "gated-gelu",
    }
