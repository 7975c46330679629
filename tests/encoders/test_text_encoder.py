"""Prompts survive the tokenizer, and padding never reaches what a prompt means."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videoar.encoders.text_encoder import (
    PAD,
    TextEncoder,
    TextEncoderConfig,
    TinyPromptEncoder,
    train_tokenizer,
    words_of,
)

COLORS = ("red", "green", "blue", "yellow")
CORPUS = [f"a small {color} ball moves {way}" for color in COLORS for way in ("left", "right")]
TOKENIZER = train_tokenizer(CORPUS, vocab_size=300)
CONFIG = TextEncoderConfig(vocab_size=300, hidden_size=32, num_heads=2, max_tokens=24)
PROMPTS = TinyPromptEncoder(TOKENIZER, TextEncoder(CONFIG).eval())


@pytest.fixture(params=[None, 100.0], ids=["learned", "rotary"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    """A tiny encoder with random weights."""
    return TextEncoder(replace(CONFIG, rope_theta=request.param)).eval()


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    """Bytes are the alphabet, so no text is unknown; else prompts would silently lose letters."""
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids) == text
    assert PAD not in ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\t",
        "\x00",
        "<pad>",
        "a <pad> b",
        "e\u0301 \u00e9",
        "日本語",
        "🏳️‍🌈👩‍👩‍👧",
        "\ufeff",
        "\u202eabc",
        "x" * 5000,
    ],
)
def test_hostile_text_comes_back_from_its_tokens(text: str) -> None:
    """Control characters, joiners and the padding token's own spelling are ordinary text."""
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids) == text
    assert PAD not in ids


def test_words_of_the_corpus_are_single_tokens() -> None:
    """Merges are learned: else prompts would be bytes, and long."""
    assert len(PROMPTS.ids("a small green ball moves right")) == 6


def test_training_and_saving_give_the_same_tokenizer(tmp_path: Path) -> None:
    """Ids are an interface to trained weights; if they moved, a checkpoint would talk nonsense."""
    PROMPTS.save(tmp_path)
    again = TinyPromptEncoder(train_tokenizer(CORPUS, vocab_size=300), PROMPTS.encoder)
    for other in (TinyPromptEncoder.load(tmp_path), again):
        assert other.fingerprint() == PROMPTS.fingerprint()
        assert other.ids("Ein <pad> röter ball") == PROMPTS.ids("Ein <pad> röter ball")


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    """A smaller one would have unknown letters."""
    with pytest.raises(ValueError, match="vocab_size is 256: use 257 or more"):
        train_tokenizer(CORPUS, vocab_size=256)


def _short(max_tokens: int) -> TinyPromptEncoder:
    return TinyPromptEncoder(TOKENIZER, TextEncoder(replace(CONFIG, max_tokens=max_tokens)).eval())


def test_a_batch_is_padded_behind_the_prompts() -> None:
    """Prompts keep their tokens whatever else is in the batch."""
    batch = _short(5).tokenize(["a red ball", "", "blue"])
    for row, text in zip(batch.tolist(), ["a red ball", "", "blue"], strict=True):
        ids = PROMPTS.ids(text)
        assert row == ids + [PAD] * (5 - len(ids))


def test_a_prompt_at_the_limit_is_taken_and_one_token_more_is_refused() -> None:
    """Cutting a prompt silently would generate something else than was asked for."""
    text = "a small red ball moves left"
    assert _short(6).encode([text]).any(dim=-1).all()
    with pytest.raises(ValueError, match=r"has 6 tokens, but the limit is 5: shorten it"):
        _short(5).encode(["a", text])


def test_padding_does_not_reach_the_words(encoder: TextEncoder) -> None:
    """What stands in the rows of padding changes no bit of the others."""
    ids = PROMPTS.tokenize(["a small red ball", "blue"])
    before = encoder(ids)
    with torch.no_grad():
        encoder.embedding.weight[PAD] = 1e3
    assert torch.equal(encoder(ids), before)


def test_the_number_of_padding_rows_does_not_matter(encoder: TextEncoder) -> None:
    """A prompt means the same in a wide batch and in a narrow one."""
    ids = PROMPTS.tokenize(["a small red ball", "blue"])
    wide, narrow = encoder(ids), encoder(ids[:, :4])
    torch.testing.assert_close(wide[:, :4], narrow)
    assert not wide[:, 4:].any()


def test_prompts_of_a_batch_do_not_mix(encoder: TextEncoder) -> None:
    """A prompt's rows do not depend on its neighbours."""
    prompts = TinyPromptEncoder(TOKENIZER, encoder)
    both = prompts.encode(["a red ball", "a blue ball moves left"])
    torch.testing.assert_close(both[:1], prompts.encode(["a red ball"]))


@pytest.mark.parametrize("prompt", ["A SMALL Red ball", "A small red ball", "a small RED BALL"])
def test_capitals_are_small_letters(encoder: TextEncoder, prompt: str) -> None:
    """The captions of a training may have none: spelled in bytes, a prompt would mean nothing."""
    prompts, plain = TinyPromptEncoder(TOKENIZER, encoder), "a small red ball"
    assert torch.equal(prompts.encode([prompt]), prompts.encode([plain]))
    assert torch.equal(prompts.tokenize([prompt]), prompts.tokenize([plain]))
    assert torch.equal(prompts.tokenize(["\u00e9"]), prompts.tokenize(["e\u0301"]))
    short = TextEncoder(replace(CONFIG, max_tokens=4))
    assert not TinyPromptEncoder(TOKENIZER, short).too_long({prompt})


def test_words_of_texts() -> None:
    """Signs are no part of a word; capitals, and accents that stand apart, make no other one."""
    assert words_of(["gro\u0308\u00dfer"]) == {"größer"}
    assert words_of(["A red ball.", "the BALL's 2, größer"]) == {
        *("a", "red", "ball", "the", "s", "2", "größer"),
    }


def test_words_and_their_order_matter(encoder: TextEncoder) -> None:
    """Every row reads the whole prompt, and places count: else captions could not tell scenes."""
    prompts = TinyPromptEncoder(TOKENIZER, encoder)
    first, other, swapped = prompts.encode(["red ball left", "red ball right", "ball red left"])
    assert not torch.allclose(first[0], other[0])
    assert not torch.allclose(first[2], swapped[2])


@torch.no_grad()
def test_rotary_positions_tell_where_words_stand_to_each_other(encoder: TextEncoder) -> None:
    """Without learned positions they alone do; and a checkpoint from before them has none."""
    encoder.positions.weight.zero_()
    there, back = encoder(torch.tensor([[5, 6, 7], [7, 6, 5]]))
    alike = torch.allclose(there, back.flip(0), atol=1e-5)
    assert alike == (encoder.config.rope_theta is None)


def test_the_empty_prompt_is_zero_and_has_finite_gradients(encoder: TextEncoder) -> None:
    """It is the unconditional embedding of guidance; a softmax over nothing would be NaN."""
    rows = TinyPromptEncoder(TOKENIZER, encoder).encode(["", "a red ball"])
    assert not rows[0].any()
    assert rows[1, :3].any()
    rows.square().sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_encoding_is_deterministic_and_survives_a_state_dict(encoder: TextEncoder) -> None:
    """The same weights give the same bits, in this process and after a checkpoint."""
    rows = TinyPromptEncoder(TOKENIZER, encoder).encode(["a red ball"])
    copy = TextEncoder(encoder.config).eval()
    copy.load_state_dict(encoder.state_dict())
    assert torch.equal(TinyPromptEncoder(TOKENIZER, copy).encode(["a red ball"]), rows)
    assert torch.equal(TinyPromptEncoder(TOKENIZER, encoder).encode(["a red ball"]), rows)


def test_a_tokenizer_with_more_ids_than_the_encoder_is_refused() -> None:
    """Such a pair would fail much later, on the first rare word."""
    small = TextEncoder(replace(CONFIG, vocab_size=260))
    with pytest.raises(ValueError, match=r"is \d+: use the 260 or fewer"):
        TinyPromptEncoder(TOKENIZER, small)


def test_heads_must_divide_the_channels() -> None:
    """A remainder would be dropped from attention."""
    with pytest.raises(ValueError, match="hidden_size is 30: use a multiple of num_heads 4"):
        TextEncoderConfig(hidden_size=30)
    assert TextEncoderConfig(hidden_size=12).hidden_size == 12
    with pytest.raises(ValueError, match="hidden_size is 12: use a multiple of twice num_heads 4"):
        TextEncoderConfig(hidden_size=12, rope_theta=100.0)
