"""Callbacks: monitors, files of the run folder, progress."""

from lightning.pytorch import Callback

from radargate_pl.callbacks.announcement import GateAnnouncement
from radargate_pl.callbacks.benchmark_writer import BenchmarkWriter
from radargate_pl.callbacks.exact_resume import ExactResume
from radargate_pl.callbacks.execution_report import ExecutionReport
from radargate_pl.callbacks.expert_load import ExpertLoadMonitor
from radargate_pl.callbacks.input_answers import InputAnswers
from radargate_pl.callbacks.loss_convergence import LossConvergenceMonitor
from radargate_pl.callbacks.non_finite import NonFiniteGuard
from radargate_pl.callbacks.parts_table import PartsTable
from radargate_pl.callbacks.preemption import Preemption
from radargate_pl.callbacks.progress import RunProgressBar
from radargate_pl.callbacks.replica_check import ReplicaCheck
from radargate_pl.callbacks.resource_guard import ResourceGuard
from radargate_pl.callbacks.result_writer import ResultWriter
from radargate_pl.callbacks.rotation_angles import RotationAngleMonitor
from radargate_pl.callbacks.run_checkpoint import RunCheckpoint
from radargate_pl.callbacks.run_summary import RunSummary
from radargate_pl.callbacks.sample_generations import SampleGenerations

# What every run of the command line has, by the name of its section in the config. The summary comes last, after all
# that it reads and speaks of; Lightning itself moves checkpoints (and Preemption, behind them) behind all others.
DEFAULTS: dict[str, type[Callback]] = {
    "announcement": GateAnnouncement,
    "parts": PartsTable,
    "execution": ExecutionReport,
    "progress": RunProgressBar,
    "rotation_angles": RotationAngleMonitor,
    "expert_load": ExpertLoadMonitor,
    "loss_convergence": LossConvergenceMonitor,
    "samples": SampleGenerations,
    "results": ResultWriter,
    "benchmarks": BenchmarkWriter,
    "input_answers": InputAnswers,
    "resource_guard": ResourceGuard,
    "non_finite": NonFiniteGuard,
    "replicas": ReplicaCheck,
    "resume": ExactResume,
    "checkpoint": RunCheckpoint,
    "preemption": Preemption,
    "summary": RunSummary,
}

__all__ = [
    "DEFAULTS",
    "BenchmarkWriter",
    "ExactResume",
    "ExecutionReport",
    "ExpertLoadMonitor",
    "GateAnnouncement",
    "InputAnswers",
    "LossConvergenceMonitor",
    "NonFiniteGuard",
    "PartsTable",
    "Preemption",
    "ReplicaCheck",
    "ResourceGuard",
    "ResultWriter",
    "RotationAngleMonitor",
    "RunCheckpoint",
    "RunProgressBar",
    "RunSummary",
    "SampleGenerations",
]
