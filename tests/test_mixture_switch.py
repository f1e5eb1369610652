"""A run on plain operations is one: neither the fast mixture nor the quick path of decoding computes anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CALLS = """
import mixture_switch, torch
from builders import IN, experts_of, layer_of
from radargate_pl.decode_mixture import DecodeMixture
from radargate_pl.native_decode import NativeDecodeMixture
from radargate_pl.expert_sources import LatentSource
from radargate_pl.gates import RadarGate

def counted(self, *given, make, name):
    used.add(name)
    make(self, *given)

used = set()
for kind in (DecodeMixture, NativeDecodeMixture, LatentSource):
    make = kind.__init__
    kind.__init__ = lambda self, *given, make=make, name=kind.__name__: counted(self, *given, make=make, name=name)
layer = layer_of(experts_of(4, dtype=torch.float32), RadarGate)
layer(torch.randn(40, IN))
with torch.no_grad():
    for _ in range(4):
        layer(torch.randn(1, IN))
print(*sorted(used))
"""


@pytest.mark.parametrize(("mixture", "used"), [("plain", ""), ("", "LatentSource NativeDecodeMixture")])
def test_a_plain_run_computes_nothing_the_quick_ways(mixture: str, used: str) -> None:
    environment = os.environ | {"RADARGATE_TEST_MIXTURE": mixture, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    found = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == used
