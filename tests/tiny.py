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
from videoar.generation.router import Router, RouterConfig

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
MENU = ("frame", "chunk:2", "cube:1x2x2", "chunk:3")


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


def tiny_router(menu: tuple[str, ...] = MENU) -> Router:
    """A router whose choices depend on all that it reads."""
    channels = {"latent_channels": 4, "text_channels": MODEL.hidden_size}
    router = Router(RouterConfig(menu=menu, **channels, hidden_size=16))
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
        # About what the frames of the tiny pipeline vary by.
        router.mean[:20] = torch.tensor([0.0, 1.9, 1.4, 1.7, 1.4]).repeat_interleave(4)
        router.std[:20] = 0.1
    return router.eval()
