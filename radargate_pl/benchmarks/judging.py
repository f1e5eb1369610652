"""How what a model wrote for a benchmark is judged; `radargate test` and `radargate score` judge alike."""

from radargate_pl.benchmarks.declaration import Benchmark
from radargate_pl.scoring import Judgement, Reference, judge

# Counts up with every change of what is found in an output or counted as right: answers judged otherwise are not mixed.
RULES = 4


def judge_answer(benchmark: Benchmark, output: str, reference: Reference) -> Judgement:
    """Look for labels, which the prompt asks for, and where there is none for what the data call them.

    Args:
        benchmark: the task.
        output: what the model wrote.
        reference: what it is held against; choices and answers are labels where the task has some.

    Returns:
        What was found, as the label, and whether it is right.

    Raises:
        ValueError: see `judge`.
    """
    judgement = judge(benchmark.answer_format, output, reference)
    if judgement.extracted is not None or not benchmark.names:
        return judgement
    names = dict(zip(benchmark.labels, benchmark.names, strict=True))
    answers, choices = (tuple(names.get(text, text) for text in texts) for texts in reference[:2])
    named = judge(benchmark.answer_format, output, Reference(answers, choices))
    if named.extracted is None:
        return judgement
    return named._replace(extracted=reference.choices[choices.index(named.extracted)])
