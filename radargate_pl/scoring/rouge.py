"""ROUGE-L as Super-NaturalInstructions uses it: rouge_score with stemming, the best of the accepted answers."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from radargate_pl.scoring.optional_packages import need


def rouge_l(output: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, against the best of the references.

    rouge_score's own tokens are Latin letters and digits only, so that two equal Arabic or Russian texts would score 0.
    Where a reference has letters of another script, the tokens are its words in any script, without stemming.

    Args:
        output: a generated text.
        references: accepted answers, at least one.

    Returns:
        F in [0, 1].

    Raises:
        ValueError: if rouge_score is not installed.
    """
    return max(
        float(_scorer(all_scripts=_has_other_letters(reference)).score(reference, output)["rougeL"].fmeasure)
        for reference in references
    )


class Words:
    """Tokens of any script, for ``RougeScorer(tokenizer=...)``."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words and numbers in order, punctuation left out.

        Args:
            text: any text.
        """
        return re.findall(r"\w+", text.lower())


def _has_other_letters(text: str) -> bool:
    letters = (character for character in text if character.isalpha() and not character.isascii())
    return any(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters)


@functools.cache
def _scorer(all_scripts: bool) -> Any:
    scorer = need("rouge_score.rouge_scorer", "ROUGE-L").RougeScorer
    return scorer(["rougeL"], tokenizer=Words()) if all_scripts else scorer(["rougeL"], use_stemmer=True)
