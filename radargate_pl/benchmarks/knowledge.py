"""Multiple-choice questions: the paper's eight tasks named after MMLU's auxiliary training data, and GPQA.

Prompts and choices are those of lm-evaluation-harness 0.4.13 where it has the task. Ranked, the texts of the choices
follow the question; an answer that is to be written needs them listed, so generation has a prompt of its own.
"""

from radargate_pl.benchmarks.declaration import Benchmark, HubLayout

HARNESS = "the task files of lm-evaluation-harness and a copy of the hub's card"
ARC = "Clark et al. 2018, Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge"
LISTED = "Question: {question}\n{options}\nAnswer:"


def _science(name: str, paper_name: str, hub: HubLayout | None, citation: str) -> Benchmark:
    return Benchmark(
        name=name,
        group="MMLU",
        paper_name=paper_name,
        prompt="Question: {question}\nAnswer:",
        generation_prompt=LISTED,
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        hub=hub,
        citation=citation,
    )


def _arc(config: str) -> HubLayout:
    return HubLayout(
        dataset="allenai/ai2_arc",
        configs=(config,),
        split="test",
        inputs={"question": "question"},
        choices=("choices.text",),
        letters="choices.label",
        answer="answerKey",
        answer_is="letter",
        id="id",
        checked=HARNESS,
    )


def _reading(name: str, paper_name: str, kind: str, text: str, hub: HubLayout, citation: str) -> Benchmark:
    """A question about a text. The harness's RACE joins the questions of an article; these stand alone."""
    opening = f"{kind}: {{{text}}}\n\nQuestion: {{question}}\n"
    return Benchmark(
        name=name,
        group="MMLU",
        paper_name=paper_name,
        prompt=opening + "Answer:",
        generation_prompt=opening + "{options}\nAnswer:",
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        hub=hub,
        citation=citation,
    )


KNOWLEDGE = (
    _science("arc_challenge", "ARC-HARD", _arc("ARC-Challenge"), ARC),
    # No data set of the hub has these two apart from MMLU's other auxiliary training data.
    _science("science_middle", "SCIENCE-MIDDLE", None, "AI2 Science Questions, 8th grade, 2016"),
    _reading(
        "race",
        "RACE",
        "Article",
        "article",
        HubLayout(
            dataset="ehovy/race",
            configs=("all",),
            split="test",
            inputs={"article": "article", "question": "question"},
            choices=("options",),
            answer="answer",
            answer_is="letter",  # example_id is that of the article
            checked="the hub's card, and public code that reads it",
        ),
        "Lai et al. 2017, RACE: Large-scale ReAding Comprehension Dataset From Examinations",
    ),
    Benchmark(
        name="openbookqa",
        group="MMLU",
        paper_name="OBQA",
        prompt="{question}",
        generation_prompt=LISTED,
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        hub=HubLayout(
            dataset="allenai/openbookqa",
            configs=("main",),
            split="test",
            inputs={"question": "question_stem"},
            choices=("choices.text",),
            letters="choices.label",
            answer="answerKey",
            answer_is="letter",
            id="id",
            checked=HARNESS,
        ),
        citation="Mihaylov et al. 2018, Can a Suit of Armor Conduct Electricity? A New Dataset for Open Book QA",
    ),
    _reading(
        "mctest",
        "MC-TEST",
        "Story",
        "story",
        HubLayout(
            dataset="sagnikrayc/mctest",
            configs=("mc160", "mc500"),
            split="test",
            revision="refs/convert/parquet",  # its main branch is a program, which `datasets` no longer runs
            inputs={"story": "story", "question": "question"},
            line_break="\\newline",
            choices=tuple(f"answer_options.{letter}" for letter in "ABCD"),
            answer="answer",
            answer_is="letter",
            checked="public code that reads it; the column of ids is not used, so not checked",
        ),
        "Richardson et al. 2013, MCTest: A Challenge Dataset for the Open-Domain Machine Comprehension of Text",
    ),
    Benchmark(
        name="mmlu_professional_law",  # stands in for aux-law-90s, which no public copy keeps apart
        group="MMLU",
        paper_name="AUX-LAW-90S",
        description="The following are multiple choice questions (with answers) about professional law.\n\n",
        prompt="{question:stripped}\n{options}\nAnswer:",
        labels=("A", "B", "C", "D"),
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        hub=HubLayout(
            dataset="cais/mmlu",
            configs=("professional_law",),
            split="test",
            inputs={"question": "question"},
            choices=("choices",),
            answer="answer",
            answer_is="letter",
            checked=HARNESS,
        ),
        citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding",
    ),
    _science("arc_easy", "ARC-EASY", _arc("ARC-Easy"), ARC),
    _science("science_elementary", "SCIENCE-ELEMENTARY", None, "AI2 Science Questions, elementary grades, 2016"),
    Benchmark(
        name="gpqa",
        group="GPQA",
        paper_name="GPQA",
        prompt="What is the correct answer to this question:{question}\nChoices:\n{options:brackets}\nAnswer:",
        labels=("(A)", "(B)", "(C)", "(D)"),
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        hub=HubLayout(
            dataset="Idavidrein/gpqa",
            configs=("gpqa_main",),
            split="train",
            inputs={"question": "Question"},
            choices=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            answer="Correct Answer",
            answer_is="text",  # the right one stands first, so a hash of the question orders them anew
            id="Record ID",
            is_gated=True,
            checked=HARNESS,
        ),
        is_private=True,
        citation="Rein et al. 2023, GPQA: A Graduate-Level Google-Proof Q&A Benchmark",
    ),
)
