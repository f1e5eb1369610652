"""The two forms of the quick path of decoding: native code, and torch's operations where there is none."""

from typing import Any

import pytest
from torch import Tensor

from radargate_pl import decode_mixture, native_decode, shared_inputs

FORMS = ("native", "torch")


def count_updates(monkeypatch: pytest.MonkeyPatch, form: str) -> list[int]:
    """For how many layers each quick computation was, once only this form is used; 0 where it stepped aside."""
    found: list[int] = []
    forms = {"native": native_decode.NativeDecodeMixture, "torch": decode_mixture.DecodeMixture}
    if form == "torch":
        monkeypatch.setattr(shared_inputs, "suits_native", lambda *_: False)
    else:
        monkeypatch.setattr(shared_inputs, "suits_native", lambda *_: True)
    computed = forms[form].updates

    def updates(self: Any, x: Tensor) -> Any:
        result = computed(self, x)
        found.append(0 if result is None else len(result))
        return result

    monkeypatch.setattr(forms[form], "updates", updates)
    return found
