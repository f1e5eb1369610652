"""Every gate by name: ``radargate_pl.gates.RadarGate`` in a config."""

from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.gates.fixed import FixedGate, TaskGate, UniformGate
from radargate_pl.gates.radar import RadarGate, RotationGate
from radargate_pl.gates.rotmole import RotMoLEGate
from radargate_pl.gates.stretch import StretchGate

# The test matrix runs over this tuple: a gate entered here is proved against the dense reference.
ALL_GATES = (StretchGate, RotationGate, RadarGate, RotMoLEGate, UniformGate, FixedGate, TaskGate)

__all__ = [
    "ALL_GATES",
    "Context",
    "FixedGate",
    "Gate",
    "RadarGate",
    "RotMoLEGate",
    "RotationGate",
    "Routing",
    "Site",
    "StretchGate",
    "TaskGate",
    "UniformGate",
]
