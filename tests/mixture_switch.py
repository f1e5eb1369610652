"""RADARGATE_TEST_MIXTURE=plain runs every test on the plain operations that `fast_mixture` is tested against.

Importing this decides it, in processes that tests start as well.
"""

import os

import radargate_pl.mixture
import radargate_pl.moe

IS_PLAIN = os.environ.get("RADARGATE_TEST_MIXTURE") == "plain"
if IS_PLAIN:
    radargate_pl.mixture.is_fast = lambda *_: False
    radargate_pl.moe.reads_input = lambda *_: False
