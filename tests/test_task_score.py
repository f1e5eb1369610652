"""Scores of a task: against sacrebleu, scikit-learn, published intervals and hand-made numbers."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import sacrebleu
import torch

from radargate_pl.scoring import Measure, Row, chance_level, levels, majority_level, measure
from radargate_pl.scoring import translations as translations_module
from radargate_pl.scoring.classification import f1, matthews
from radargate_pl.scoring.intervals import bootstrap, wilson


def choices(answers, predictions):
    return [Row(a == p, p, a, p or "", None) for a, p in zip(answers, predictions, strict=True)]


def translations(outputs, answers):
    return [Row(True, output, answer, output, 50.0) for output, answer in zip(outputs, answers, strict=True)]


OUTPUTS = [
    "the cat sat on the mat",
    "",
    "Příčiny požáru jsou neznámé.",
    "Британские ученые сказали, что результаты интересны.",
    "one two, three!  four\n",
    "a completely different sentence of words",
    "1,234.5 Euro",
]
ANSWERS = [
    "the cat is on the mat",
    "nothing was said here",
    "Výše škod a příčiny požáru jsou zatím neznámé.",
    "Британские ученые сказали, что результаты были интересны, но предупредили.",
    "one, two, three, four",
    "another sentence of many other words",
    "1.234,5 Euro",
]


# ---- intervals ----


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, R. G. (1998), Statistics in Medicine 17, 857-872, table I, method 3 (without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval():
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 2.0, size=400)
    low, high = bootstrap([(value, 1.0) for value in values], lambda sums: sums[0] / sums[1])
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_bootstrap_touches_nobodys_random_numbers():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    rows = [Row(True, "x", "x", "x", value / 10) for value in range(10)]
    random.seed(1)
    first = measure("rouge_l", rows)
    random.setstate(states[0])
    assert measure("rouge_l", rows) == first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


# ---- shares ----


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "sentence_chrf_accuracy"])
def test_shares(name):
    rows = choices("aaaaaaaaab", "aaaaaaaabb")[::-1]
    assert measure(name, rows) == Measure(0.9, *wilson(9, 10), 10)


def test_levels():
    assert majority_level(["yes", "no", "yes", "yes"]) == 0.75
    assert chance_level([4, 4, 2, 5]) == pytest.approx((0.25 + 0.25 + 0.5 + 0.2) / 4)


def test_levels_count_positions():
    """Option texts differ from question to question; the most frequent text says nothing."""
    questions = [(["x", "y"], "y"), (["p", "q"], "q"), (["r", "s", "r"], "r")]
    assert levels("accuracy", questions) == (pytest.approx(2 / 3), pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3))
    assert levels("matthews", questions) == (0.0, 0.0)
    assert levels("accuracy", [*questions, ((), "7")]) == (None, None)


# ---- Matthews and F1 ----


def test_matthews_by_hand():
    # 6 of class b found, 1 missed; 2 of class a right, 1 put into b
    rows = choices("bbbbbbb" + "aaa", "bbbbbba" + "aab")
    found = measure("matthews", rows)
    assert found.value == pytest.approx((6 * 2 - 1 * 1) / (7 * 7 * 3 * 3) ** 0.5)
    assert -1 <= found.low < found.value < found.high <= 1


def test_f1_by_hand():
    rows = choices("bbbbbbb" + "aaa", "bbbbbba" + "aab")
    found = measure("f1", rows, labels=("a", "b"))
    precision, recall = 6 / 7, 6 / 7
    assert found.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert measure("f1", rows, labels=("b", "a")).value == pytest.approx(2 * 2 / (3 + 3))


@pytest.mark.parametrize("classes", ["ab", "abcd"])
@pytest.mark.parametrize("share_missing", [0.0, 0.2])
def test_against_scikit_learn(classes, share_missing):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = random.Random(3)
    answers = generator.choices(classes, k=200)
    predictions = [a if generator.random() < 0.6 else generator.choice(classes) for a in answers]
    predictions = [None if generator.random() < share_missing else p for p in predictions]
    rows = choices(answers, predictions)
    shown = [p or "none" for p in predictions]
    assert measure("matthews", rows).value == pytest.approx(metrics.matthews_corrcoef(answers, shown), abs=1e-12)
    expected = metrics.f1_score([a == "b" for a in answers], [p == "b" for p in predictions])
    assert measure("f1", rows, labels=("a", "b")).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rows", [choices("aaaa", "aaaa"), choices("aabb", "aaaa"), choices("ab", [None, None])])
def test_matthews_without_variation_is_zero(rows):
    assert measure("matthews", rows).value == 0.0


def test_f1_of_a_class_that_is_not_there():
    assert f1(0, 0, 0) == 0.0
    assert matthews([[0, 0], [0, 0]]) == 0.0
    with pytest.raises(ValueError, match="Expected labels to be two"):
        measure("f1", choices("ab", "ab"), labels=("a", "b", "c"))


# ---- translations and ROUGE-L ----


def test_corpus_scores_are_those_of_sacrebleu():
    rows = translations(OUTPUTS, ANSWERS)
    bleu, chrf = measure("bleu", rows), measure("chrf", rows)
    assert bleu.value == sacrebleu.corpus_bleu([o.strip() for o in OUTPUTS], [ANSWERS]).score
    assert chrf.value == sacrebleu.corpus_chrf([o.strip() for o in OUTPUTS], [ANSWERS]).score
    for found in (bleu, chrf):
        assert 0 <= found.low < found.value < found.high <= 100


def test_the_interval_of_bleu_is_as_wide_as_sacrebleus_own():
    generator = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "big", "small"]
    answers = [" ".join(generator.choices(words, k=12)) for _ in range(200)]
    outputs = [" ".join(w if generator.random() < 0.7 else generator.choice(words) for w in a.split()) for a in answers]
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        found = measure(name, translations(outputs, answers))
        own = metric.corpus_score(outputs, [answers], n_bootstrap=1000)
        assert found.value == pytest.approx(own.score, abs=1e-9)
        assert (found.high - found.low) / 2 == pytest.approx(own._ci, rel=0.1)


def test_perfect_and_empty_translations():
    assert measure("bleu", translations(ANSWERS, ANSWERS)).value == pytest.approx(100)
    assert measure("chrf", translations(ANSWERS, ANSWERS)) == Measure(100.0, None, None, 7)
    assert measure("bleu", translations([""] * 7, ANSWERS)) == Measure(0.0, None, None, 7)


def test_corpus_scores_take_the_best_of_all_accepted_translations():
    """As sacrebleu does where all sentences have equally many; a sentence with one alone is no worse off."""
    others = [f"{answer} Oder anders." for answer in ANSWERS]
    rows = [Row(True, o, a, o, 50.0, (b,)) for o, a, b in zip(OUTPUTS, ANSWERS, others, strict=True)]
    stripped = [output.strip() for output in OUTPUTS]
    assert measure("bleu", rows).value == sacrebleu.corpus_bleu(stripped, [ANSWERS, others]).score
    assert measure("chrf", rows).value == sacrebleu.corpus_chrf(stripped, [ANSWERS, others]).score
    accepted = [("ein ganz anderer Satz hier", "das ist der Hund von nebenan"), ("noch ein Satz steht hier",)]
    rows = [Row(True, a[-1], a[0], a[-1], 100.0, a[1:]) for a in accepted]
    assert measure("bleu", rows).value == pytest.approx(100)
    assert measure("chrf", rows).value == pytest.approx(100)


def test_rouge_is_the_mean_of_the_values():
    rows = [Row(False, "x", "x", "x", value) for value in (0.0, 0.5, 1.0, 1.0)]
    found = measure("rouge_l", rows)
    assert found.value == 0.625
    assert 0 <= found.low < found.value < found.high <= 1
    assert measure("rouge_l", [Row(True, "7", "7 eggs", "7", None)]).value == pytest.approx(2 / 3)


def test_no_interval_where_no_draw_differs_from_another():
    """A model that always says the same, perfect translations: [x, x] would look like certainty."""
    assert measure("matthews", choices("aabb" * 50, "aaaa" * 50)) == Measure(0.0, None, None, 200)
    assert measure("accuracy", choices("a", "a")).low == pytest.approx(0.2065, abs=1e-4)


def test_means_of_equal_values_are_bounded_by_how_many_others_there_can_be():
    """No answer in a hundred has a word of the reference: at most 3.7 % of all have, and a word is worth at most 1."""
    nothing = measure("rouge_l", [Row(False, "x", "y", "x", 0.0)] * 100)
    assert nothing == Measure(0.0, 0.0, pytest.approx(wilson(0, 100)[1]), 100)
    perfect = measure("rouge_l", [Row(True, "x", "x", "x", 1.0)] * 100)
    assert perfect == Measure(1.0, pytest.approx(wilson(100, 100)[0]), pytest.approx(1.0), 100)
    one = measure("rouge_l", [Row(True, "x", "x", "x", 0.5)])
    assert 0 < one.low < 0.5 < one.high < 1


# ---- bad input ----


def test_no_examples_and_no_such_score():
    with pytest.raises(ValueError, match="at least one judged example"):
        measure("accuracy", [])
    with pytest.raises(ValueError, match="Expected a score to be one of accuracy"):
        measure("acuracy", choices("a", "a"))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    translations_module._metric.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'radargate-pl\[benchmarks\]'"):
        measure("bleu", translations(OUTPUTS, ANSWERS))
