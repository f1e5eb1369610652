"""Translations: corpus BLEU and chrF by sacrebleu with its defaults, and a sentence-level chrF."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from radargate_pl.scoring.optional_packages import need

CHRF_THRESHOLD = 60.0
"""Sentence chrF from which on a translation counts as right in ``sentence_chrf_accuracy``.

The paper reports accuracies on WMT14 without saying when a sentence is right; this is our own rule. On 1,500 sentences
of newstest2014 (en-cs, en-ru, en-de) the reference of another sentence reaches at most 30 and the first half of the
right reference 51 in the median: nine of ten such halves stay below 60. So nothing that leaves out half counts.
"""


def sentence_chrf(output: str, references: Sequence[str]) -> float:
    """Score one sentence by chrF (character n-grams up to 6, beta 2), against the best of its references.

    Args:
        output: the translation.
        references: accepted translations, at least one.

    Returns:
        chrF in [0, 100].

    Raises:
        ValueError: if sacrebleu is not installed.
    """
    return float(_metric("chrf").sentence_score(output, list(references)).score)


def corpus_statistics(
    name: Literal["bleu", "chrf"], outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[float]], Callable[[Any], float]]:
    """What a corpus score is made of: counts that add up over sentences, and the score of such sums.

    Args:
        name: ``bleu`` (13a tokens, exponential smoothing: sacrebleu's defaults) or ``chrf``.
        outputs: translations, one a sentence.
        references: accepted translations of each sentence in the same order, at least one of each.

    Returns:
        The counts of each sentence, and the function from their sum to the score in [0, 100].

    Raises:
        ValueError: if sacrebleu is not installed.
    """
    metric = _metric(name)
    # The two steps of corpus_score, which any metric of sacrebleu must implement: resampling needs them apart, and its
    # own resampling reports only half the width of the interval.
    # sacrebleu wants equally many references of all; a repeated one changes neither score.
    most = max(map(len, references))
    streams = [[accepted[min(number, len(accepted) - 1)] for accepted in references] for number in range(most)]
    counts = metric._extract_corpus_statistics(list(outputs), streams)
    return counts, lambda sums: float(metric._compute_score_from_stats(sums).score)


@functools.cache
def _metric(name: Literal["bleu", "chrf"]) -> Any:
    metrics = need("sacrebleu.metrics", "translation scores")
    return metrics.BLEU() if name == "bleu" else metrics.CHRF()
