"""Hand-made outputs of every answer format: what is found in them, and whether it is right."""

from __future__ import annotations

import time

import pytest
import sacrebleu

from radargate_pl.scoring import CHRF_THRESHOLD, Reference, judge
from radargate_pl.scoring.choices import choice_of, find_choice
from radargate_pl.scoring.mathematics import find_mathematics
from radargate_pl.scoring.numbers import find_number, number_of
from radargate_pl.scoring.options import read_options

# ---- choice ----

MOON = ("the sun", "the moon", "Paris", "London Bridge")
YES_NO = ("yes", "no")
ESNLI = ("yes", "it is not possible to tell", "no")
RTE = ("entailment", "not_entailment")
COLA = ("unacceptable", "acceptable")
QQP = ("not_duplicate", "duplicate")
MNLI = ("True", "Neither", "False")
SST2 = ("negative", "positive")
TABLE = ("salt", "pepper", "salt and pepper", "sugar")
AQUA = ("(A) 20", "(B) 26", "(C) 24", "(D) 22", "(E) 26.5")
LETTERS = ("(A)", "(B)", "(C)", "(D)")
SENTENCES = ('Sentence A: "He spent it all, so none was left"', 'Sentence B: "He spent it all, so much was left"')
ARABIC = ("نعم", "لا")

CHOICES = [
    # a letter in any common form
    ("B", MOON, 1),
    ("(B)", MOON, 1),
    ("B.", MOON, 1),
    ("b", MOON, 1),
    ("a) the sun", MOON, 0),
    ("Answer: B", MOON, 1),
    ("the answer is (B)", MOON, 1),
    ("The answer is:\nB", MOON, 1),
    ("The answer is B because it glows at night", MOON, 1),
    ("The correct option is C", MOON, 2),
    ("B is the correct answer. A is not.", MOON, 1),
    ("(B) is correct; (A) is too hot.", MOON, 1),
    ("I would choose option C", MOON, 2),
    ("[B]", MOON, 1),
    ("The answer is [B]", MOON, 1),
    ("the answer is [b].", MOON, 1),
    ("[[B]]", MOON, 1),
    ("<B>", MOON, 1),
    ("B is the answer", MOON, 1),
    ("Therefore, B is the answer.", MOON, 1),
    ("B is the answer because it is not as far as Paris", MOON, 1),
    ("If B is the answer, it has to glow. So it is C.", MOON, 2),
    ("I do not think B is correct.", MOON, None),
    ("I choose B because the sun is too hot", MOON, 1),
    ("I would not choose B because it is far, but rather C.", MOON, 2),
    ("It must be (b)", MOON, 1),
    ("The answer is B and not C", MOON, 1),
    ("The answer is B rather than C", MOON, 1),
    ("The answer is B as well as C", MOON, None),
    # a letter and its reason
    ("B because it glows", MOON, 1),
    ("B, because it glows", MOON, 1),
    ("(B), because (A) is too hot", MOON, 1),
    ("C because B is wrong", MOON, 2),
    ("B since the sun is too hot", MOON, 1),
    ("A because it glows", MOON, 0),
    ("A because it glows. No, the answer is B.", MOON, 1),
    ("**B**", MOON, 1),
    (r"$\boxed{\text{B}}$", MOON, 1),
    ("\uff22", MOON, 1),  # full width
    ("\u200f(B)\u200e", MOON, 1),  # between right-to-left and left-to-right marks
    # letters that are words
    ("A man walks by.", MOON, None),
    ("Answer: a dog", MOON, None),
    ("A dog is the answer", MOON, None),
    ("A bird because it flies", MOON, None),
    ("A for effort", MOON, None),
    ("A not very bright man walks by", MOON, None),
    ("I for one do not know", tuple("abcdefghi"), None),
    ("<b>Mars</b>", MOON, None),
    ("[b]Mars[/b]", MOON, None),
    ("Vitamin D is the answer", ("iron", "vitamin D", "salt", "sugar"), 1),
    ("Z", MOON, None),
    # an option's text
    ("the moon", MOON, 1),
    ("The  MOON.", MOON, 1),
    ("It is Paris, of course", MOON, 2),
    ("Not the sun. It must be London Bridge", MOON, 3),
    ("Paris is the best answer, the moon is far", MOON, 2),
    ("36 - 10 = 26", AQUA, 1),
    ("26.5", AQUA, 4),  # not the 26 in it
    ("1,000", ("100", "1000"), 1),
    ("\u22125", ("5", "-5"), 1),  # a minus sign proper
    ("NO\u2082 (B) or so", ("CO\u2082", "NO\u2082"), 1),
    ("carbon (C)", ("sodium (Na)", "lithium (Li)", "sulfur (S)", "carbon (C)"), 3),
    ("The moon rather than Paris", MOON, 1),
    # without its article, where that is an option's text too
    ("moon", MOON, 1),
    ("The sun is hot. The answer is moon", MOON, 1),
    ("the sun is hot. The answer is moon", ("the sun", "the moon"), 1),
    ("A dog is the answer", ("a cat", "a dog"), 1),
    ("dog", ("a dog", "the dog"), None),
    ("moon", ("the moon", "moon"), 1),
    ("It is C", ("the C", "a D"), None),
    # letter against text: the letter was asked for
    ("B) Paris", MOON, 1),
    ("B. the moon", MOON, 1),
    ("So: (D) 26", ("(A) 26", "(B) 27", "(C) 18", "(D) 26"), 3),
    # several options: the last statement, else the last mention
    ("Both (A) and (C) fail. The answer is (D).", MOON, 3),
    ("22 + 4 = 26, so the answer is (B).", AQUA, 1),
    ("The answer is not (B). It must be (C).", MOON, 2),
    ("First the sun, then the moon", MOON, 1),
    ("A or B", MOON, None),
    ("The answer is A or B", MOON, None),
    ("The answer is (A) or (B)", MOON, None),
    ("The answer is (A), (B) and (C)", MOON, None),
    ("Either (A) or (B), no: (C)", MOON, 2),
    ("B is correct, some say; but D is correct.", MOON, 3),
    ("(A)? (B)? (C)?", MOON, 2),
    ("(A) is too hot and (D) is too far, so (B)", MOON, 1),
    ("It is New York City, I think", ("New York", "New York City"), 1),
    # texts joined choose nothing, like letters
    ("positive or negative", SST2, None),
    ("Is this sentence positive or negative?", SST2, None),
    ("Is it a positive or a negative one?", SST2, None),
    ("Is it positive or negative? Positive.", SST2, 1),
    ("positive/negative", SST2, None),
    ("positive, negative", SST2, None),
    ("positive nor negative", SST2, None),
    ("It is both positive and negative.", SST2, None),
    ("It is positive and negative at times, so negative", SST2, 0),
    ("not positive but negative", SST2, 0),
    ("negative, not positive", SST2, 0),
    ("negative and not positive", SST2, 0),
    ("True or False", MNLI, None),
    ("True, False or Neither?", MNLI, None),
    ("True, False, or Neither? Neither.", MNLI, 1),
    ("The answer is True or False.", MNLI, None),
    ("True. The answer is True or False.", MNLI, None),
    ("True/False: False", MNLI, 2),
    ("yes or no", YES_NO, None),
    ("no or yes", YES_NO, None),
    ("no/yes", YES_NO, None),
    ("A: yes or no", YES_NO, None),
    ("Yes or no? No, it is not.", YES_NO, 1),
    ("Yes, no doubt about it.", YES_NO, 0),
    ("The answer is yes and no one doubts it.", YES_NO, 0),
    ("The answer is the moon and the sun is too hot.", MOON, 1),
    ("The moon, the sun is too hot.", MOON, 1),
    ("the sun, the moon, Paris or London Bridge", MOON, None),
    ("It shines on the sun, the moon and Paris.", MOON, None),
    ("sun or moon", MOON, None),
    ("(A) 20 or (B) 26", AQUA, None),
    ("The answer is (A) 20 or (B) 26.", AQUA, None),
    ("C) the sun and the moon", ("the sun", "the moon", "the sun and moon both"), 2),
    ("salt and pepper", TABLE, 2),
    ("The answer is salt and pepper.", TABLE, 2),
    ("salt and pepper", ("salt", "pepper"), None),
    ("salt and pepper or sugar", TABLE, None),
    ("Sentence A or Sentence B", SENTENCES, None),
    (" or ".join(SENTENCES), SENTENCES, None),
    # what is stated last is no option: what stands before it does not count
    ("The sun is hot. The answer is Jupiter.", MOON, None),
    ("The answer is the sun. No, the answer is Jupiter.", MOON, None),
    ("No, because it is hot. The answer is maybe.", YES_NO, None),
    ("B is correct. The answer is E.", MOON, None),
    ("The answer is Jupiter? It must be the moon.", MOON, 1),
    ("It is the moon. The answer is not the sun.", MOON, 1),
    ("It is the moon. The answer is clear.", MOON, 1),
    ("It is the moon. So the answer is", MOON, 1),
    ("The moon is the answer, as it is cold.", MOON, 1),
    ("What is the answer? The answer is B.", MOON, 1),
    ("The moon. Answer; because the night is dark.", MOON, 1),
    # options restated, and a letter that a later statement takes back
    ("A) the sun\nB) the moon\nAnswer: B", MOON, 1),
    ("(A) 12 (B) 24 (C) 36. The answer is (B).", ("12", "24", "36"), 1),
    ("A. the sun\nB. the moon\nC. Paris\nD. London Bridge\nThe correct answer is C.", MOON, 2),
    ("A. It is hot.\nSo the answer is B.", MOON, 1),
    ("A\nWait, the answer is B.", MOON, 1),
    ("A: the sun\nB: the moon\nAnswer: (B)", MOON, 1),
    ("B\nOption (A) is too hot.", MOON, 1),
    ("B. It is cold. (A) is too hot.", MOON, 1),
    ("(B) the moon\nExplanation: it is cold.", MOON, 1),
    # a capital letter at the end
    ("I think it's B.", MOON, 1),
    ("Sure! B", MOON, 1),
    ("It is not B.", MOON, None),
    ("It is between A and B.", MOON, None),
    ("The moon, which gives no vitamin D.", MOON, 1),
    # neither of two
    ("neither positive nor negative", ("negative", "positive"), None),
    ("It is neither very positive nor very negative.", ("negative", "positive"), None),
    ("Neither (A) nor (B)", YES_NO, None),
    ("Not negative, nor sad.", ("negative", "positive"), 1),
    # yes and no inside longer text
    ("No, because there is a yes in it.", YES_NO, 1),
    ("I see no reason to doubt it. Therefore the answer is yes.", YES_NO, 0),
    ("Yesterday nobody noted it.", YES_NO, None),
    ("It is not possible to tell.", ESNLI, 1),
    ("The answer is no.", ESNLI, 2),
    ("A: no", YES_NO, 1),
    ("yes\nQuestion: Is it?\nAnswer: no", YES_NO, 0),  # the model went on by itself
    # negations
    ("not acceptable", COLA, 0),
    ("This isn't a grammatically acceptable sentence.", COLA, 0),
    ("It is unacceptable.", COLA, 0),
    ("not unacceptable", COLA, 1),
    ("acceptable", COLA, 1),
    ("not entailment", RTE, 1),
    ("not-entailment", RTE, 1),
    ("entailment", RTE, 0),
    ("The first does not show entailment", RTE, 1),
    ("They are not a duplicate", QQP, 0),
    ("not only acceptable but fine", COLA, 1),
    ("neither true nor false", MNLI, 1),
    # options with letters of their own
    ("(B)", AQUA, 1),
    ("B. 26", AQUA, 1),
    ("The answer is (D).", LETTERS, 3),
    ("Sentence B", SENTENCES, 1),
    ("sentence a makes no sense", SENTENCES, 0),
    # other scripts
    ("الجواب هو نعم", ARABIC, 0),
    ("لا", ARABIC, 1),
    ("\u7b54\u6848\u662f\u5317\u4eac", ("\u4e0a\u6d77", "\u5317\u4eac"), 1),
    ("Да.", ("нет", "да"), 1),
    # nothing
    ("", MOON, None),
    (" \n", YES_NO, None),
    ("I do not know", YES_NO, None),
]


@pytest.mark.parametrize(("output", "choices", "expected"), CHOICES)
def test_choices(output, choices, expected):
    answer = choices[0] if expected is None else choices[expected]
    found = judge("choice", output, Reference((answer,), choices))
    assert found.extracted == (None if expected is None else choices[expected])
    assert found.correct == (expected is not None)
    assert found.value is None


def test_every_option_is_found_word_for_word():
    for choices in (
        MOON,
        YES_NO,
        ESNLI,
        RTE,
        COLA,
        QQP,
        MNLI,
        AQUA,
        LETTERS,
        SENTENCES,
        ARABIC,
        ("B", "A"),
        ("<", ">"),
    ):
        for choice in choices:
            assert judge("choice", choice, Reference((choice,), choices)).correct


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("(B)", AQUA, 1),
        ("B", MOON, 1),
        ("The moon", MOON, 1),
        ("Sentence B", SENTENCES, 1),
        ("(A)", ("(A) S", "(B) Y"), 0),
        ("A", ("B", "A"), 1),
    ],
)
def test_a_reference_names_its_option(answer, choices, expected):
    assert choice_of(answer, choices) == expected


@pytest.mark.parametrize(("answer", "choices"), [("maybe", YES_NO), ("(F)", AQUA), ("", MOON)])
def test_an_answer_outside_the_choices(answer, choices):
    with pytest.raises(ValueError, match="Expected the answer to be one of the choices"):
        judge("choice", "yes", Reference((answer,), choices))


def test_choices_that_are_none():
    with pytest.raises(ValueError, match="at least two options"):
        judge("choice", "yes", Reference(("yes",), ("yes",)))
    with pytest.raises(ValueError, match="at most 26 choices"):
        read_options([str(number) for number in range(27)])


# ---- number ----

NUMBERS = [
    ("3 + 4 = 7 eggs.\n#### 7", "7", "7"),
    ("#### 7\nThat is 7 of 12", "7", "7"),  # the marked one, not the last
    ("#### Step 1\nWe add.\n#### $1,234", "1234", "1234"),  # a heading is no mark
    ("The total is 1,234,567.", "1234567", "1234567"),
    ("Rs. 1,00,000", "100000", "100000"),
    ("1\u202f234 km", "1234", "1234"),  # thin space
    ("It costs $1,250.00.", "1250", "1250.00"),
    ("\u20ac 18", "18", "18"),
    ("he loses -$5", "-5", "-5"),
    ("$-5", "-5", "-5"),
    ("\u22125 degrees", "-5", "-5"),  # a minus sign proper
    ("8-3", "3", "3"),  # takes away
    ("8 - 3 = 5", "5", "5"),
    ("3/4 of it", "0.75", "3/4"),
    (r"\frac{3}{4}", "0.75", "3/4"),
    (r"-\frac{3}{4}", "-0.75", "-3/4"),
    (r"so $-\dfrac34$.", "-0.75", "-3/4"),
    (r"x=\frac{-1}{2}", "-0.5", "-1/2"),
    (r"-1\frac{1}{2}", "-1.5", "-3/2"),
    (r"2-\frac{1}{2}", "0.5", "1/2"),  # takes away
    (r"(2)-\frac{12}5", "2.4", "12/5"),
    ("\u00be", "0.75", "3/4"),
    ("1\u00bd cups", "1.5", "3/2"),
    ("2 1/2 hours", "2.5", "5/2"),
    ("3.0", "3", "3.0"),
    (".5", "0.5", "0.5"),
    ("It is 18.", "18", "18"),
    ("he waits ...18", "18", "18"),
    ("50%", "50", "50"),
    (r"50\% of them", "50", "50"),
    ("12 and 5 make 17", "17", "17"),
    ("18kg", "18", "18"),
    ("an area of 5 m^2", "5", "5"),
    ("H2O is 18", "18", "18"),
    ("CO2", "2", None),
    ("**42**", "42", "42"),
    (r"\boxed{42}", "42", "42"),
    ("1.5e3", "1500", "1.5e3"),
    ("\u0661\u0662\u0663", "123", "123"),  # Arabic digits
    ("\u200fالجواب هو 42\u200f", "42", "42"),  # noqa: RUF001
    ("18 dollars\nQuestion: How many are 3 and 4?", "18", "18"),
    ("", "7", None),
    ("I do not know.", "7", None),
    ("seven", "7", None),
]


@pytest.mark.parametrize(("output", "answer", "expected"), NUMBERS)
def test_numbers(output, answer, expected):
    found = judge("number", output, Reference((answer,)))
    assert found == (expected, expected is not None, None)


@pytest.mark.parametrize(
    ("output", "answer"),
    [("-5", "5"), ("1.234", "1234"), ("0.33", "1/3"), ("12", "1"), ("1,23", "123"), ("7 of 12", "7")],
)
def test_other_numbers_are_wrong(output, answer):
    assert not judge("number", output, Reference((answer,))).correct


def test_any_accepted_number_counts():
    assert judge("number", "43.0", Reference(("42", "43"))).correct


@pytest.mark.parametrize("answer", ["seven", "", "3 and 4"])
def test_a_reference_that_is_no_number(answer):
    assert number_of(answer) is None
    with pytest.raises(ValueError, match="Expected the answer to be a number of"):
        judge("number", "7", Reference((answer,)))


HUGE = [
    "the answer is 1e99999999",
    "1e-99999999",
    "1e51",
    "1E+0999",
    "1/" + "7" * 5000,
    "7" * 5000,
    "-" + "7" * 5000 + ".5",
    "0." + "3" * 5000,
    "2 1/" + "7" * 5000,
    "2 " + "7" * 5000 + "/3",
    r"\frac{" + "7" * 5000 + "}{3}",
]


@pytest.mark.parametrize("output", HUGE, ids=lambda output: output[:24])
def test_numbers_too_long_to_compare_are_found_but_wrong(output):
    """Exact values would fill the memory (1e99999999), and Python refuses to read more than 4300 digits."""
    begun = time.process_time()
    found = judge("number", output, Reference(("7",)))
    assert found.extracted is not None
    assert not found.correct
    assert time.process_time() - begun < 5
    assert number_of(output) is None


@pytest.mark.parametrize("output", ["1/0x", "5/0kg", "1 1/0x", "1/00_", r"\frac{1}{0}", "1/0", "1e5x", "1e", "/0", "-"])
def test_no_output_raises(output):
    assert not judge("number", output, Reference(("7",))).correct


def test_numbers_of_fifty_digits_are_compared():
    digits = "1234567890" * 5
    assert judge("number", f"#### {digits}", Reference((digits,))).correct
    assert not judge("number", f"#### {digits[:-1]}1", Reference((digits,))).correct
    assert judge("number", "1e50", Reference(("10e49",))).correct


# ---- translation ----

GERMAN = "Wahrscheinlich werden wir bald verstehen, warum das so ist."
TRANSLATIONS = [
    (GERMAN, GERMAN),
    (f"  {GERMAN}\n", GERMAN),
    ("Wahrscheinlich verstehen wir bald, warum das so ist.", GERMAN),
    ("Wahrscheinlich werden wir bald", GERMAN),
    ("Probably we will soon understand why this is so.", GERMAN),
    ("wahrscheinlich werden wir bald verstehen warum das so ist", GERMAN),
    ("Die Katze schläft.", GERMAN),
    ("", GERMAN),
    ("...", GERMAN),
    ("Привет, мир!", "Привет, мир!"),
    ("Здравствуй, мир!", "Привет, мир!"),
    ("مرحبا بالعالم", "مرحبا بالعالم"),
    ("مرحبا", "مرحبا بالعالم"),
    ("1,234 Euro", "1.234 Euro"),
    ("-5 Grad", "\u22125 Grad"),
    ("Příčiny požáru jsou zatím neznámé.", "Výše škod a příčiny požáru jsou zatím neznámé."),
    ("Zeile eins\nZeile zwei", "Zeile eins Zeile zwei"),
]


@pytest.mark.parametrize(("output", "answer"), TRANSLATIONS)
def test_sentence_chrf_is_that_of_sacrebleu(output, answer):
    found = judge("translation", output, Reference((answer,)))
    expected = sacrebleu.sentence_chrf(output.strip(), [answer]).score
    assert found == (output.strip() or None, expected >= CHRF_THRESHOLD, pytest.approx(expected, abs=1e-12))


def test_the_threshold_means_more_than_half():
    half = " ".join(GERMAN.split()[:4])
    assert not judge("translation", half, Reference((GERMAN,))).correct
    assert judge("translation", GERMAN.replace("warum", "wieso"), Reference((GERMAN,))).correct
    assert judge("translation", "b b b", Reference(("a a a", "b b b"))).correct  # the best reference counts


# ---- text ----

TEXTS = [
    ("Nicholas Sparks", ("Nicholas Sparks",), "Nicholas Sparks", True),
    ("nicholas sparks.", ("Nicholas Sparks",), "nicholas sparks", True),
    ("The answer is Nicholas Sparks.", ("Nicholas Sparks",), "Nicholas Sparks", True),
    ("The writer is named. So the answer is: Nicholas Sparks", ("Nicholas Sparks",), "Nicholas Sparks", True),
    ('"Nicholas Sparks"', ("Nicholas Sparks",), "Nicholas Sparks", True),
    ("Nicholas  Sparks\nHe was born in 1965.", ("Nicholas Sparks",), "Nicholas  Sparks", True),
    ("The Eiffel Tower", ("Eiffel Tower",), "The Eiffel Tower", True),
    ("an eiffel-tower", ("Eiffeltower",), "an eiffel-tower", True),
    ("Sparks", ("Nicholas Sparks",), "Sparks", False),
    ("Sparks", ("Nicholas Sparks", "Sparks"), "Sparks", True),
    ("1,234", ("1234",), "1,234", True),
    ("$5", ("5",), "$5", False),
    ("-5", ("\u22125",), "-5", True),
    ("-5", ("5",), "-5", False),
    ("1.5", ("15",), "1.5", False),
    ("3 km", ("3 km",), "3 km", True),
    ("O\u2019Brien", ("O'Brien",), "O'Brien", True),
    ("باريس", ("باريس",), "باريس", True),
    ("\u200fباريس\u200f", ("باريس",), "باريس", True),  # noqa: RUF001
    ("stra\u00dfe", ("STRASSE",), "stra\u00dfe", True),
    ("+", ("+",), "+", True),
    ("-", ("+",), "-", False),
    ("Paris\nQuestion: Who?\nAnswer: London", ("Paris",), "Paris", True),
    ("**Paris**", ("Paris",), "Paris", True),
    ("", ("Paris",), None, False),
    (" \n ", ("Paris",), None, False),
]


@pytest.mark.parametrize(("output", "answers", "extracted", "correct"), TEXTS)
def test_texts(output, answers, extracted, correct):
    assert judge("text", output, Reference(answers)) == (extracted, correct, None)


# ---- ROUGE-L ----

ROUGES = [
    ("the cat sat", ("the cat sat",), 1.0, True),
    ("The cat, sat!", ("the cat sat",), 1.0, True),
    ("the cat", ("the cat sat on a mat",), 2 * (2 / 2) * (2 / 6) / (2 / 2 + 2 / 6), False),
    ("sat cat the", ("the cat sat",), 1 / 3, False),
    ("a dog", ("the cat sat",), 0.0, False),
    ("a dog", ("the cat sat", "a dog"), 1.0, True),
    ("a cat", ("the cat sat", "the cat"), 0.5, False),
    ("running dogs", ("run dog",), 1.0, False),  # stemmed
    ("43.0", ("43",), 2 / 3, False),
    ("1,234", ("1234",), 0.0, True),
    ("$5", ("5",), 1.0, False),
    ("-5", ("5",), 1.0, False),
    ("Привет мир", ("Привет мир",), 1.0, True),
    ("Привет", ("Привет мир",), 2 / 3, False),
    ("مرحبا بالعالم", ("مرحبا بالعالم",), 1.0, True),
    ("بالعالم", ("مرحبا بالعالم",), 2 / 3, False),
    ("\u00fcber", ("\u00fcber",), 1.0, True),
    ("", ("the cat",), 0.0, False),
    ("...", ("the cat",), 0.0, False),
]


@pytest.mark.parametrize(("output", "answers", "value", "correct"), ROUGES)
def test_rouge(output, answers, value, correct):
    found = judge("rouge", output, Reference(answers))
    assert found == (output.strip() or None, correct, pytest.approx(value, abs=1e-12))


@pytest.mark.parametrize(
    ("output", "answers", "correct"),
    [
        ("[-10.5, 25.5]", ("[-10.5, 25.5]",), True),
        (" [-10.5, 25.5]. ", ("[-10.5, 25.5]",), True),
        ("[-10.5, 2.5]", ("[-10.5, 25.5]",), False),
        ("25.5", ("[-10.5, 25.5]",), False),
        ("", ("none",), False),
        ("It is 7", ("seven", "7"), True),
        ("seven", ("seven", "7"), True),
    ],
)
def test_answers_of_mathematics_that_are_no_number_are_held_against_the_text(output, answers, correct):
    assert judge("number or text", output, Reference(answers)).correct == correct


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("420", "420"),
        ("$420$", "420"),
        (" $\\frac{1}{2}$. ", "\\frac{1}{2}"),
        ("x^2 + 1", "x^2 + 1"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("(3, 4)", "(3, 4)"),
        ("We add 3 and 4", None),
        ("3\n4", None),
        ("", None),
    ],
)
def test_a_bare_formula_is_an_answer_of_math(output, found):
    assert find_mathematics(output) == found


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (r"So \boxed{3} bolts in 2 days.", "3"),
        (r"\boxed{2}, no: \boxed{1,250} in 3 days", "1250"),
        (r"\boxed{\frac{3}{4}} of 12", "3/4"),
        (r"#### 7 and not \boxed{8}", "7"),
        (r"\boxed{3 + 4} makes 7", "7"),
        (r"It is 5.", "5"),
    ],
)
def test_a_boxed_number_is_the_answer(output, found):
    assert find_number(output) == found


@pytest.mark.parametrize("dash", ["-", "\u2013", "\u2014"])
@pytest.mark.parametrize("words", ["I would pick B {} a safe choice.", "The answer is B {} it is cold"])
def test_a_dash_behind_a_letter_is_like_a_comma(words, dash):
    assert find_choice(words.format(dash), ["the sun", "the moon", "the sea", "the sky"]) == 1
