"""Callbacks: monitors, files of the run folder, progress."""

from lightning.pytorch import Callback

from radargate_pl.callbacks.announcement import GateAnnouncement
from radargate_pl.callbacks.expert_load import ExpertLoadMonitor
from radargate_pl.callbacks.loss_convergence import LossConvergenceMonitor
from radargate_pl.callbacks.progress import RunProgressBar
from radargate_pl.callbacks.result_writer import ResultWriter
from radargate_pl.callbacks.rotation_angles import RotationAngleMonitor
from radargate_pl.callbacks.run_checkpoint import RunCheckpoint
from radargate_pl.callbacks.run_summary import RunSummary
from radargate_pl.callbacks.sample_generations import SampleGenerations

# What every run of the command line has, by the name of its section in the config. The summary comes last, after all
# that it reads and speaks of; Lightning itself moves checkpoints behind all others.
DEFAULTS: dict[str, type[Callback]] = {
    "announcement": GateAnnouncement,
    "progress": RunProgressBar,
    "rotation_angles": RotationAngleMonitor,
    "expert_load": ExpertLoadMonitor,
    "loss_convergence": LossConvergenceMonitor,
    "samples": SampleGenerations,
    "results": ResultWriter,
    "checkpoint": RunCheckpoint,
    "summary": RunSummary,
}

__all__ = [
    "DEFAULTS",
    "ExpertLoadMonitor",
    "GateAnnouncement",
    "LossConvergenceMonitor",
    "ResultWriter",
    "RotationAngleMonitor",
    "RunCheckpoint",
    "RunProgressBar",
    "RunSummary",
    "SampleGenerations",
]
