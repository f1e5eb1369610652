"""RADARGATE_TEST_MIXTURE=plain runs every test on the plain operations that the quick forms are tested against.

These are `fast_mixture` and the quick path of decoding. Importing this decides it, in processes that tests start as
well. Tests about the quick path itself keep it: they ask for `quick_decoding`.
"""

import os

import radargate_pl.mixture
import radargate_pl.moe
import radargate_pl.shared_inputs

IS_PLAIN = os.environ.get("RADARGATE_TEST_MIXTURE") == "plain"
is_decoding = radargate_pl.shared_inputs._is_decoding
if IS_PLAIN:
    radargate_pl.mixture.is_fast = lambda *_: False
    radargate_pl.moe.reads_input = lambda *_: False
    radargate_pl.shared_inputs._is_decoding = lambda *_: False
