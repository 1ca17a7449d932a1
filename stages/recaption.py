"""recaption: captions rewritten by a language model, the old one and the model on record.

What is read is what the prompt names: `{caption}`, or any other column in braces.
"""

from __future__ import annotations

from stages.captions.captioner import Captioner, CaptionSettings
from stages.captions.verdict import columns


class RecaptionSettings(CaptionSettings):
    pass


class Recaption(Captioner[RecaptionSettings]):
    """The caption rewritten by a language model, beside the raw answer and what made it."""

    name = column = "recaption"
    Settings = RecaptionSettings
    adds = columns(column)
    after = ("filter",)
