"""Stretching stays in the convex hull of the selected experts, rotation leaves it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import IN, OUT, OneLayer, experts_of, layer_of, randomise
from reference import distance_to_hull, expert_outputs, project_onto_hull
from scipy.optimize import minimize

from radargate_pl.gates import RadarGate, StretchGate
from radargate_pl.records import record_gates


@pytest.mark.parametrize("points", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_projection_the_tests_use_is_exact(points: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    corners, target = generator.normal(size=(points, 5)), 2 * generator.normal(size=5)
    nearest, weights = project_onto_hull(corners, target)
    solution = minimize(
        lambda w: np.sum((w @ corners - target) ** 2),
        np.full(points, 1 / points),
        jac=lambda w: 2 * corners @ (w @ corners - target),
        bounds=[(0, 1)] * points,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(points)},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert np.allclose(weights @ corners, nearest, atol=1e-12)
    assert np.allclose(solution.x @ corners, nearest, atol=1e-5)
    assert np.all((corners - nearest) @ (target - nearest) <= 1e-10)  # the optimality condition of a projection
    inside = generator.dirichlet(np.ones(points)) @ corners
    assert distance_to_hull(corners, inside) < 1e-12


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("angle_norm", ["none", "rms"])
def test_stretch_stays_in_the_hull_of_the_selected_experts_and_radar_leaves_it(top_k: int, angle_norm: str) -> None:
    experts = experts_of(5)
    x = 0.5 * torch.randn(40, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = torch.stack(expert_outputs(x, list(experts.values())), dim=1).numpy()
    distances, longest = {}, []
    for gate in (StretchGate, RadarGate):
        options = {"top_k": top_k} | ({"angle_norm": angle_norm} if gate is RadarGate else {})
        layer = layer_of(experts, partial(gate, **options))
        randomise(layer.gate.double())
        with record_gates(OneLayer(layer)) as recorded:
            mixed = (layer(x) - layer.base_layer(x)).detach().numpy()
        distances[gate] = []
        for token, chosen in enumerate(recorded["layer"].indices.tolist()):
            corners = outputs[token, chosen]
            if top_k == 1:  # not renormalised: the hull with 0 added
                corners = np.concatenate([corners, np.zeros((1, OUT))])
            distances[gate].append(distance_to_hull(corners, mixed[token]) / np.linalg.norm(corners, axis=1).max())
            longest.append(np.linalg.norm(mixed[token]) / np.linalg.norm(corners, axis=1).max())
    assert max(distances[StretchGate]) < 1e-12
    assert min(distances[RadarGate]) > 1e-6
    assert np.median(distances[RadarGate]) > 0.02
    assert max(longest) <= 1 + 1e-12  # weights sum to at most 1 and rotation keeps norms
