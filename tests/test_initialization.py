"""Starts depend on seed and name: gates of one seed are comparable, experts do not depend on their company."""

import torch

from radargate_pl.gates import RadarGate, RotationGate, Site, StretchGate

SITE = Site("model.layers.0.q_proj", in_features=12, out_features=10, rank=3, experts=("a", "b", "c"))
OTHER = Site("model.layers.1.q_proj", in_features=12, out_features=10, rank=3, experts=("a", "b", "c"))


def test_gates_of_one_seed_start_from_the_same_scorer_and_angles():
    torch.manual_seed(3)
    radar, stretch, rotation = RadarGate(SITE), StretchGate(SITE), RotationGate(SITE)
    assert torch.equal(radar.scorer.weight, stretch.scorer.weight)
    assert torch.equal(radar.rotation.P, rotation.rotation.P)


def test_another_layer_and_another_seed_start_elsewhere():
    torch.manual_seed(3)
    here, there = RadarGate(SITE), RadarGate(OTHER)
    torch.manual_seed(4)
    later = RadarGate(SITE)
    for other in (there, later):
        assert not torch.equal(here.scorer.weight, other.scorer.weight)
        assert not torch.equal(here.rotation.P, other.rotation.P)


def test_building_a_gate_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    RadarGate(SITE)
    assert torch.equal(torch.rand(1), expected)
