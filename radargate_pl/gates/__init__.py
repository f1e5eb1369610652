"""Every gate by name: ``radargate_pl.gates.RadarGate`` in a config."""

from radargate_pl.gates.arrow import ArrowGate
from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.gates.compositions import DirectLoRA, LoraHub, PEMs
from radargate_pl.gates.expert_choice import ExpertChoiceGate
from radargate_pl.gates.fixed import FixedGate, TaskGate, UniformGate
from radargate_pl.gates.nexus import NexusGate
from radargate_pl.gates.radar import RadarGate, RotationGate
from radargate_pl.gates.rotmole import RotMoLEGate
from radargate_pl.gates.stretch import StretchGate
from radargate_pl.gates.tutel import TutelGate

# The test matrix runs over this tuple: a gate entered here is proved against the dense reference.
ALL_GATES = (
    StretchGate,
    RotationGate,
    RadarGate,
    RotMoLEGate,
    TutelGate,
    NexusGate,
    ExpertChoiceGate,
    ArrowGate,
    UniformGate,
    FixedGate,
    DirectLoRA,
    PEMs,
    LoraHub,
    TaskGate,
)

__all__ = [
    "ALL_GATES",
    "ArrowGate",
    "Context",
    "DirectLoRA",
    "ExpertChoiceGate",
    "FixedGate",
    "Gate",
    "LoraHub",
    "NexusGate",
    "PEMs",
    "RadarGate",
    "RotMoLEGate",
    "RotationGate",
    "Routing",
    "Site",
    "StretchGate",
    "TaskGate",
    "TutelGate",
    "UniformGate",
]
