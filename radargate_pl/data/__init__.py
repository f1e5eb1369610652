"""Data: records of tasks from files, the hub or generators, mixed, tokenised and batched; and benchmarks."""

from radargate_pl.data.benchmark_data import BenchmarkData
from radargate_pl.data.flan import FlanMixture

__all__ = ["BenchmarkData", "FlanMixture"]
