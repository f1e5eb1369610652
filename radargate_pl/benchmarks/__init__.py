"""Benchmarks: what the models are tested on, declared in one place and readable without any library.

Six collections of the paper: GLUE in `glue.py`; the tasks named after MMLU, and GPQA, in `knowledge.py`; GSM8K and MATH
in `mathematics.py`; WMT14 in `translation.py`. The nine fitting tasks and natural instructions in `instructions.py`.
"""

from radargate_pl.benchmarks.declaration import PROTOCOLS, Benchmark, HubLayout, Protocol
from radargate_pl.benchmarks.glue import GLUE
from radargate_pl.benchmarks.instructions import FLAN_COT, natural_instruction
from radargate_pl.benchmarks.judging import RULES, judge_answer
from radargate_pl.benchmarks.knowledge import KNOWLEDGE
from radargate_pl.benchmarks.mathematics import MATHEMATICS
from radargate_pl.benchmarks.names import nearest_names
from radargate_pl.benchmarks.translation import WMT14

PAPER = (*GLUE, *KNOWLEDGE, *WMT14, *MATHEMATICS)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*PAPER, *FLAN_COT)}

NIV2 = "niv2"  # names a group too: every file of natural instructions that is found
GROUPS: dict[str, tuple[str, ...]] = {
    "glue": tuple(benchmark.name for benchmark in GLUE),
    "mmlu": tuple(benchmark.name for benchmark in KNOWLEDGE if benchmark.group == "MMLU"),
    "wmt14": tuple(benchmark.name for benchmark in WMT14),
    "flan_cot": tuple(benchmark.name for benchmark in FLAN_COT),
    "paper": tuple(benchmark.name for benchmark in PAPER),
}

__all__ = [
    "BENCHMARKS",
    "GROUPS",
    "NIV2",
    "PROTOCOLS",
    "RULES",
    "Benchmark",
    "HubLayout",
    "Protocol",
    "judge_answer",
    "natural_instruction",
    "nearest_names",
]
