"""Real classes at tiny size, with random weights: what the tests run."""

import torch

from videoar.core.transformer import ModelConfig, VideoTransformer
from videoar.encoders.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    TinyPromptEncoder,
    train_tokenizer,
)
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline

CODEC = TinyCodecConfig(
    latent_channels=4,
    encoder_channels=(4, 4, 4),
    decoder_channels=(4, 4, 4, 4),
    num_blocks=1,
    pixel_range="signed",
    time_padding="front",
)
MODEL = ModelConfig(
    latent_channels=4,
    num_layers=2,
    num_heads=2,
    head_dim=12,
    ffn_dim=48,
    text_dim=16,
    freq_dim=16,
    rope_theta=100.0,
)
TEXT = TextEncoderConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, max_tokens=24)
SCHEMES = (
    "frame",
    "chunk:2",
    "key-detail:3",
    "multiscale:2,1",
    "multiscale:4,2,1/frames=3",
    "cube:1x2x2",
    "cube:2x2x1/wavefront",
    "cube:1x1x3/snake",
)


def tiny_transformer(config: ModelConfig = MODEL, *, seed: int = 0) -> VideoTransformer:
    """A transformer none of whose weights are zero, so that every input matters."""
    model = VideoTransformer(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def tiny_pipeline(*, seed: int = 0) -> VideoPipeline:
    """Prompt to frames in milliseconds; the frames are noise."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["a red ball moves left", "a blue square"], vocab_size=300)
    return VideoPipeline(
        transformer=tiny_transformer(seed=seed),
        prompt_encoder=TinyPromptEncoder(tokenizer, TextEncoder(TEXT).eval()),
        codec=TinyCodec(CODEC).eval(),
        sampling=GenerationConfig(window_frames=6, num_inference_steps=2),
    )
