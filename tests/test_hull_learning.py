"""The paper's claim as a test: what no convex mixture of the experts can reach, RadarGate learns.

Targets lie outside the convex hull of ALL expert outputs and inside the ball whose radius is the longest of them. The
floor of every gate that only stretches is then the distance to the hull, and it is solved exactly for each example.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import experts_of, layer_of
from reference import expert_outputs, project_onto_hull, rotate_rows
from torch import Tensor

from radargate_pl.gates import RadarGate, StretchGate
from radargate_pl.moe import MoELinear

EXAMPLES, IN, OUT, EXPERTS = 48, 16, 12, 3


def problem(seed: int) -> tuple[dict, Tensor, Tensor, Tensor]:
    """Experts, inputs around a common mean, and targets: the experts' mean turned by 0.5 to 1.2 rad in every plane.

    Turning by constants is not what RadarGate computes (its angles follow the input): not a target of its class.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = experts_of(
        EXPERTS, in_features=IN, out_features=OUT, ranks=(4,), scalings=(1.0,), dtype=torch.float32, seed=seed
    )
    x = torch.randn(IN, generator=generator) + 0.5 * torch.randn(EXAMPLES, IN, generator=generator)
    outputs = torch.stack(expert_outputs(x, list(experts.values())), dim=1)
    angles = 0.5 + 0.7 * torch.rand(EXPERTS, OUT // 2, generator=generator)
    turned = [rotate_rows(outputs[:, i], angles[i].expand(EXAMPLES, -1)) for i in range(EXPERTS)]
    return experts, x, outputs, torch.stack(turned, dim=1).mean(1)


def fitted(layer: MoELinear, x: Tensor, target: Tensor, steps: int = 400) -> float:
    """Train the gate alone on the squared distance; the last loss."""
    optimizer = torch.optim.AdamW(layer.gate.parameters(), lr=1e-2, weight_decay=0.0)
    base = layer.base_layer(x)
    for _ in range(steps):
        loss = (layer(x) - base - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("top_k", [2, EXPERTS])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_radar_gate_learns_what_lies_outside_the_hull(seed: int, top_k: int) -> None:
    experts, x, outputs, target = problem(seed)
    points, wanted = outputs.double().numpy(), target.double().numpy()
    distances = np.array([np.linalg.norm(project_onto_hull(p, t)[0] - t) for p, t in zip(points, wanted, strict=True)])
    longest = np.linalg.norm(points, axis=-1).max(axis=1)
    assert np.all(distances > 0.05 * longest)  # every target is outside the hull of all experts
    assert np.all(np.linalg.norm(wanted, axis=-1) < longest)  # and inside the ball that rotations can reach
    optimum = float(np.mean(distances**2))
    losses = {}
    for gate in (RadarGate, StretchGate):
        torch.manual_seed(seed)
        losses[gate] = fitted(layer_of(experts, partial(gate, top_k=top_k), seed=seed), x, target)
    assert losses[StretchGate] >= optimum * (1 - 1e-5)  # nothing inside the hull beats the projection onto it
    assert losses[RadarGate] <= 0.8 * optimum
