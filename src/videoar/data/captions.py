"""The text side of training: an encoder that learns along, or rows that were encoded once."""

from pathlib import Path

from videoar.data.latents import EMPTY_TEXT, LatentsInfo
from videoar.encoders.text_encoder import PromptEncoder, StoredText, TextEncoder
from videoar.weights import read_weights


def text_module(
    prompts: PromptEncoder, latents: Path, info: LatentsInfo
) -> TextEncoder | StoredText:
    """Return what makes rows of the captions of a folder: of token ids, or of stored rows.

    Raises:
        ValueError: a frozen encoder, and a folder without its rows.
    """
    if prompts.trainable is not None:
        return prompts.trainable
    wanted = prompts.fingerprint()
    if info.text != wanted:
        raise ValueError(
            f"{latents} has captions encoded by {info.text or 'nothing'}, but the checkpoint's"
            f" text encoder is {wanted}: prepare the videos again, with that checkpoint as --codec"
        )
    return StoredText(read_weights(latents / EMPTY_TEXT)["rows"])
