"""Benchmarks: the declarations of all tasks, readable without any library."""

from radargate_pl.benchmarks.declaration import PROTOCOLS, Benchmark, HubLayout, Protocol

BENCHMARKS: dict[str, Benchmark] = {}
GROUPS: dict[str, tuple[str, ...]] = {}

__all__ = ["BENCHMARKS", "GROUPS", "PROTOCOLS", "Benchmark", "HubLayout", "Protocol"]
