"""The parts of Wan at tiny size with random weights, and their files under the original's names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, processors, trainers

diffusers = pytest.importorskip("diffusers", reason="the extra `wan` is not installed")
transformers = pytest.importorskip("transformers")


def randomise(module: torch.nn.Module, *, scale: float, seed: int = 0) -> Any:
    """Give every weight a value that matters; norms stay near one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return module.eval()


def transformer() -> Any:
    """Two layers of two heads."""
    return randomise(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
        ),
        scale=0.1,
    )


def tokenizer() -> Any:
    """Byte-level BPE that ends every text, as umT5's does."""
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["a red ball moves left"], trainer)
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
    )


T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def codec_name(key: str) -> str:
    """Return the name of the original for one of diffusers, for two residual blocks a level."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3"}
    parts |= {"conv2": "residual.6", "conv_shortcut": "shortcut"}
    key = re.sub(r"\b(norm1|norm2|conv1|conv2|conv_shortcut)\b", lambda found: parts[found[1]], key)
    key = key.replace("conv_in", "conv1").replace("down_blocks", "downsamples")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda f: f"middle.{2 * int(f[1])}", key)
    key = key.replace("mid_block.attentions.0", "middle.1")
    key = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)",
        lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}",
        key,
    )
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda f: f"upsamples.{4 * int(f[1]) + 3}", key)
    key = key.replace("norm_out", "head.0").replace("conv_out", "head.2")
    key = re.sub(r"^post_quant_conv", "conv2", key)
    return re.sub(r"^quant_conv", "conv1", key)


def text_name(key: str) -> str:
    """Return the name of the original for one of transformers."""
    whole = {
        "shared.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    if key in whole:
        return whole[key]
    _, _, block, _, layer, part = key.removesuffix(".weight").split(".", 5)
    names = {
        "layer_norm": f"norm{int(layer) + 1}",
        "SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "DenseReluDense.wi_0": "ffn.gate.0",
        "DenseReluDense.wi_1": "ffn.fc1",
        "DenseReluDense.wo": "ffn.fc2",
    }
    names |= {f"SelfAttention.{row}": f"attn.{row}" for row in "qkvo"}
    return f"blocks.{block}.{names[part]}.weight"


def transformer_name(key: str) -> str:
    """Return the name of the original for one of diffusers: norm2 and norm3 change places."""
    names = {
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "norm2": "norm3",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "o",
    }
    if key == "scale_shift_table":
        return "head.modulation"
    if key.endswith("scale_shift_table"):
        return key.replace("scale_shift_table", "modulation")
    for theirs_, original in names.items():
        key = re.sub(rf"(?<![\w.]){theirs_}(?=\.)|(?<=\.){theirs_}(?=\.)", original, key)
    return key


def codec_of_full_depth() -> Any:
    """A codec with the two residual blocks that the original's files always have."""
    return randomise(diffusers.AutoencoderKLWan(base_dim=8), scale=0.1, seed=2)


def pipeline() -> Any:
    """Build the pipeline of diffusers."""
    torch.manual_seed(0)
    config = transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu")
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=randomise(transformers.UMT5EncoderModel(config), scale=0.3),
        vae=randomise(diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1), scale=0.1),
        transformer=transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def save(pipe: Any, folder: Path) -> Path:
    """Write what diffusers writes, with the text encoder in shards."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    return folder


def save_original(pipe: Any, folder: Path) -> Path:
    """Write the files of the original; its codec has another depth than that of the pipeline."""
    folder.mkdir()
    weights = pipe.transformer.state_dict()
    renamed = {transformer_name(key): tensor for key, tensor in weights.items()}
    assert len(renamed) == len(weights)
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors")
    config = {"dim": 24, "num_heads": 2, "model_type": "t2v", "eps": 1e-6, "ffn_dim": 48}
    config |= {"freq_dim": 16, "in_dim": 16, "out_dim": 16, "num_layers": 2, "text_len": 512}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **config}))
    text = pipe.text_encoder.state_dict()
    text = {text_name(key): text[key] for key in text if "embed_tokens" not in key}
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    codec = codec_of_full_depth().state_dict()
    renamed = {codec_name(key): tensor for key, tensor in codec.items()}
    torch.save(renamed, folder / "Wan2.1_VAE.pth")
    return folder
