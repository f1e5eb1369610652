r"""Answers of MATH: the box, equality by Math-Verify and by string rules, and a library that is late or missing."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import pytest

from radargate_pl.notices import say_once
from radargate_pl.scoring import Reference, equivalence, judge
from radargate_pl.scoring.equivalence import Verifier
from radargate_pl.scoring.mathematics import equal_mathematics, find_mathematics, normalised

FOUND = [
    (r"So $x = \boxed{5}$.", "5"),
    (r"\boxed{1} no, \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\text{a } \{1, 2\}}", r"\text{a } \{1, 2\}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{{1\\}} of {2", r"{1\\}"),  # a line break, then a brace that closes
    (r"it is $\boxed 5$.", "5"),
    (r"\boxed{5}" + "\nProblem: What is \\boxed{6}?", "5"),
    ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", r"\frac12"),
    ("The answer is 12.", "12"),
    (r"\boxed{\frac{1}{2}", None),  # cut off in the middle
    (r"\boxed{}", None),
    ("so x is 5", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "expected"), FOUND)
def test_the_answer_found(output, expected):
    assert find_mathematics(output) == expected


BY_STRINGS = [
    (r"\frac{3}{2}", "1 1/2"),
    ("1.5", r"1 \frac12"),
    ("10000", r"10,\!000"),
    ("10000", r"10\,000"),
    ("12345", "12 345"),
    ("5", "5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{3}{4}", ".75"),
    ("-3", "\u22123"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    ("3", "3.0"),
    (r"\sqrt{3}", r"\sqrt3"),
    (r"18\text{ cm}", "18"),
    (r"18\mbox{ cm}^2", "18"),
    (r"\$18", "18"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"x = 5", "5"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"\text{Monday}", "Monday"),
    (r"\frac{\sqrt{2}}{2}", r"\tfrac{ \sqrt{2} }{2}"),
    (r"\boxed{5}", "5"),
]
BY_MATH_VERIFY = [
    (r"10\sqrt{2}", r"\sqrt{200}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"x \in [1,2]", "[1,2]"),
    ("2^{10}", "1024"),
]
DIFFERENT = [
    ("11", "1 1"),
    ("123", "12 3"),
    ("1234", "1 23 4"),
    (r"\frac{11}{2}", "1 1/2"),
    ("3", "-3"),
    ("5", "6"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("1,000", "1,001"),
    (r"\pi", "3.14"),
    ("x+1", "x-1"),
    (r"\text{Monday}", r"\text{Tuesday}"),
    ("12", r"1\frac{1}{2}"),
    ("5", "}{"),
    ("(1,000)", "1000"),
]


@pytest.mark.parametrize(("one", "other"), BY_STRINGS)
def test_equal_by_string_rules(one, other, monkeypatch):
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert equal_mathematics(one, other)
    assert judge("math", rf"\boxed{{{other}}}", Reference((one,))).correct


@pytest.mark.parametrize(("one", "other"), BY_MATH_VERIFY)
def test_equal_by_math_verify_only(one, other, monkeypatch):
    assert equal_mathematics(one, other)
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert not equal_mathematics(one, other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_formulas(one, other):
    assert normalised(one) != normalised(other)
    assert not equal_mathematics(one, other)


@pytest.mark.parametrize("number", ["7" * 5000, "0." + "3" * 5000, rf"\frac{{{'7' * 5000}}}{{3}}", "1e99999999"])
def test_numbers_too_long_to_compare_are_wrong(number, monkeypatch):
    assert not judge("math", rf"\boxed{{{number}}}", Reference(("7",))).correct
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert not judge("math", rf"\boxed{{{number}}}", Reference(("7",))).correct
    assert judge("math", rf"\boxed{{{number}}}", Reference((number,))).correct


# What is no number is not compared as the number in it.
NO_NUMBERS = [
    ("5!", "5"),
    ("|-3|", "-3"),
    ("[3]", "3"),
    ("5'", "5"),
    ("3-", "3"),
    ("*3", "3"),
    ("3:", "3"),
    ("{3", "3"),
]
NUMBERS = [
    ("0.50", r"\frac{1}{2}"),
    (r"1\frac{1}{2}", "1.5"),
    (r"-\frac{3}{4}", "-0.75"),
    ("+3", "3.0"),
    (r"1{,}000.0", "1000"),
    ("-7/2", "-3.5"),
    ("{5}", "5.0"),
]


# Math-Verify itself reads brackets as parentheses and a prime as nothing: there its word counts.
BY_VERIFIER = [pair for pair in NO_NUMBERS if pair[0] not in ("[3]", "5'")]


@pytest.mark.parametrize(
    ("formula", "number", "has_verifier"),
    [*((*pair, True) for pair in BY_VERIFIER), *((*pair, False) for pair in NO_NUMBERS)],
)
def test_a_formula_is_not_the_number_in_it(formula, number, has_verifier, monkeypatch):
    if not has_verifier:
        monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert not equal_mathematics(number, formula)
    assert not equal_mathematics(formula, number)


@pytest.mark.parametrize(("one", "other"), NUMBERS)
def test_numbers_are_compared_by_value(one, other, monkeypatch):
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert equal_mathematics(one, other)


def test_the_comma_of_a_pair_is_no_separator():
    assert normalised("(1,000)") != normalised("(1000)")
    assert normalised("1,000") == normalised("1000")


@pytest.mark.parametrize("output", ["", "I do not know", r"\boxed{"])
def test_no_answer_is_wrong(output):
    assert judge("math", output, Reference(("5",))) == (None, False, None)


def test_without_math_verify_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not equal_mathematics("2^{10}", "1024")
    (message,) = caplog.messages
    assert "radargate-pl[benchmarks]" in message


def test_a_formula_that_never_ends_is_given_up_and_the_next_one_answered():
    verifier = Verifier(seconds=1.0)
    try:
        assert verifier.ask("1/2", "0.5") is True
        first = verifier._process.pid
        begun = time.monotonic()
        assert verifier.ask("(10^9)!", "5") is None
        assert time.monotonic() - begun < 60  # a second for the formula, the rest for a new process on a busy machine
        verifier.seconds = 60.0
        assert verifier.ask("1/2", "0.5") is True
        assert verifier._process.pid != first
        os.kill(verifier._process.pid, signal.SIGKILL)
        assert verifier.ask("1/2", "0.5") in (None, True)  # as the end was noticed before or after the question
        assert verifier.ask("1/2", "0.5") is True
    finally:
        verifier.close()


def test_in_a_thread_and_beside_another_alarm():
    """Math-Verify alone refuses threads, and switches off an alarm that somebody else has set."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(equal_mathematics("2^{10}", "1024")))
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        thread.start()
        thread.join()
        assert verdicts == [True]
        assert equal_mathematics("2^{11}", "2048")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, before)
