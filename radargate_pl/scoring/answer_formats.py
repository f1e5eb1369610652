"""The forms an answer may have (layer 0)."""

from typing import Literal

AnswerFormat = Literal["choice", "number", "math", "translation", "text", "rouge"]
