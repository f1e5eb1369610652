"""The seven GLUE tasks of the paper, on GLUE's development sets: the labels of its test sets are not public.

Prompts and choices are those of lm-evaluation-harness 0.4.13.
"""

from radargate_pl.benchmarks.declaration import Benchmark, HubLayout, Protocol

CITATION = "Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding"
CHECKED = "the card of nyu-mll/glue and the task files of lm-evaluation-harness"
RANKING: Protocol = "ranking"


def _hub(config: str, *columns: str, split: str = "validation") -> HubLayout:
    inputs = {column: column for column in columns}
    return HubLayout("nyu-mll/glue", (config,), split, inputs, "label", "name", checked=CHECKED)


GLUE = (
    Benchmark(
        name="sst2",
        group="GLUE",
        paper_name="SST-2",
        prompt="{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        labels=("negative", "positive"),
        names=("negative", "positive"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy",),
        hub=_hub("sst2", "sentence"),
        citation="Socher et al. 2013, Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank",
    ),
    Benchmark(
        name="wnli",
        group="GLUE",
        paper_name="WNLI",
        prompt="{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        labels=("False", "True"),
        names=("not_entailment", "entailment"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy",),
        hub=_hub("wnli", "sentence1", "sentence2"),
        citation=CITATION,
    ),
    Benchmark(
        name="qnli",
        group="GLUE",
        paper_name="QNLI",
        prompt="{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
        labels=("yes", "no"),
        names=("entailment", "not_entailment"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy",),
        hub=_hub("qnli", "question", "sentence"),
        citation=CITATION,
    ),
    Benchmark(
        name="qqp",
        group="GLUE",
        paper_name="QQP",
        prompt="Question 1: {question1}\nQuestion 2: {question2}\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        labels=("no", "yes"),
        names=("not_duplicate", "duplicate"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy", "f1"),
        hub=_hub("qqp", "question1", "question2"),
        citation=CITATION,
    ),
    Benchmark(
        name="mnli",
        group="GLUE",
        paper_name="MNLI",
        prompt="{premise}\nQuestion: {hypothesis:sentence} True, False or Neither?\nAnswer:",
        labels=("True", "Neither", "False"),
        names=("entailment", "neutral", "contradiction"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy",),
        hub=_hub("mnli", "premise", "hypothesis", split="validation_matched"),
        citation="Williams et al. 2018, A Broad-Coverage Challenge Corpus for Sentence Understanding through Inference",
    ),
    Benchmark(
        name="rte",
        group="GLUE",
        paper_name="RTE",
        prompt="{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        labels=("True", "False"),
        names=("entailment", "not_entailment"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("accuracy",),
        hub=_hub("rte", "sentence1", "sentence2"),
        citation=CITATION,
    ),
    Benchmark(
        name="cola",
        group="GLUE",
        paper_name="CoLA",
        prompt="{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        labels=("no", "yes"),
        names=("unacceptable", "acceptable"),
        answer_format="choice",
        protocol=RANKING,
        metrics=("matthews", "accuracy"),
        hub=_hub("cola", "sentence"),
        citation="Warstadt et al. 2019, Neural Network Acceptability Judgments",
    ),
)
