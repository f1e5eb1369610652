"""Every random input of the tests times a factor: `RADARGATE_TEST_SCALE=1.001 make test`.

No test may depend on the very inputs it happens to draw: an expectation that holds by luck falls at another factor.
"""

import os
from typing import Any

import torch
from torch import Tensor

FACTOR = float(os.environ.get("RADARGATE_TEST_SCALE", "1"))


def apply_scale() -> None:
    """Let `torch.randn` return its numbers times the factor; at 1 nothing is changed."""
    if FACTOR == 1:
        return
    draw = torch.randn

    def scaled(*size: Any, **options: Any) -> Tensor:
        drawn = draw(*size, **options)
        if drawn.requires_grad:
            return (drawn.detach() * FACTOR).requires_grad_()
        return drawn.mul_(FACTOR)

    torch.randn = scaled
