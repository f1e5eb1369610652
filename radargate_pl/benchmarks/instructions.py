"""Tasks that the mixture trains on, on their test files: the paper's nine fitting tasks and natural instructions.

Asked as in a fit, their prompt is what `FlanMixture` shows; where no fit is known, a cue for the answer follows the
source.
"""

from radargate_pl.benchmarks.declaration import Benchmark
from radargate_pl.scoring.answer_formats import AnswerFormat

PROMPT = "{source}\nAnswer:"
FLAN = "Longpre et al. 2023, The Flan Collection: Designing Data and Methods for Effective Instruction Tuning"
LETTERS = tuple(f"({letter})" for letter in "ABCDEFGH")


def _choice(name: str, labels: tuple[str, ...], citation: str) -> Benchmark:
    return Benchmark(
        name=f"cot_{name}",
        group="FLAN-CoT",
        paper_name=name,
        prompt=PROMPT,
        source_prompt="{source}",
        labels=labels,
        answer_format="choice",
        protocol="ranking",
        metrics=("accuracy",),
        stop=("\n\n",),
        max_new_tokens=256,  # a rationale may come first
        hub=None,
        citation=f"{citation}; {FLAN}",
    )


def _open(name: str, answer_format: AnswerFormat, metric: str, max_new_tokens: int, citation: str) -> Benchmark:
    return Benchmark(
        name=f"cot_{name}",
        group="FLAN-CoT",
        paper_name=name,
        prompt=PROMPT,
        source_prompt="{source}",
        answer_format=answer_format,
        protocol="generation",
        metrics=(metric,),
        stop=("\n\n",),
        max_new_tokens=max_new_tokens,
        hub=None,
        citation=f"{citation}; {FLAN}",
    )


FLAN_COT = (
    _choice("aqua", LETTERS[:5], "Ling et al. 2017, AQuA-RAT"),
    _choice("creak", ("yes", "no"), "Onoe et al. 2021, CREAK"),
    _choice("ecqa", (), "Aggarwal et al. 2021, ECQA"),
    _choice("esnli", (), "Camburu et al. 2018, e-SNLI"),
    _open("gsm8k", "number", "accuracy", 512, "Cobbe et al. 2021, GSM8K"),
    _choice("qasc", LETTERS, "Khot et al. 2020, QASC"),
    _open("qed", "text", "exact_match", 256, "Lamm et al. 2020, QED"),
    _choice("sensemaking", ("Sentence A", "Sentence B"), "Wang et al. 2020, SemEval-2020 Task 4"),
    _choice("strategyqa", ("yes", "no"), "Geva et al. 2021, StrategyQA"),
)

# Metrics by the category that a file of natural instructions lies in; language, reasoning and others share ROUGE-L.
NIV2_FORMATS: dict[str, tuple[AnswerFormat, tuple[str, ...]]] = {
    "mathematics": ("number or text", ("accuracy", "rouge_l")),
    "translation": ("translation", ("bleu", "chrf", "sentence_chrf_accuracy")),
}


def natural_instruction(name: str, category: str | None) -> Benchmark:
    """The benchmark of one file of natural instructions.

    Args:
        name: Name of the file without its suffix.
        category: Folder that it lies in.
    """
    answer_format, metrics = NIV2_FORMATS.get(category or "", ("rouge", ("rouge_l", "exact_match")))
    return Benchmark(
        name=name,
        group="niv2",
        paper_name=name,
        prompt=PROMPT,
        source_prompt="{source}",
        answer_format=answer_format,
        protocol="generation",
        metrics=metrics,
        max_new_tokens=128,
        hub=None,
        citation="Wang et al. 2022, Super-NaturalInstructions",
    )
