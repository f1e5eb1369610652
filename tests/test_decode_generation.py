"""Generation of whole networks by the quick path of decoding: the tokens of the general path, however it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from quick_forms import FORMS, count_updates
from test_decoding import FIXED_LENGTH, prompts_of
from tiny_models import model_folder, network_of, write_expert

from radargate_pl import shared_inputs
from radargate_pl.backbones import load_backbone
from radargate_pl.gates import RadarGate, StretchGate
from radargate_pl.networks import GatedNetwork

pytestmark = pytest.mark.usefixtures("quick_decoding")

TARGETS = {"llama": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "t5": ("q", "k", "v", "wo")}
NEW = 12


@pytest.fixture
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GatedNetwork:
    """Six experts at every layer they share an input at."""
    kind, gate = request.param
    folder = tmp_path_factory.mktemp("experts")
    model = load_backbone(model_folder(kind), "float32").model
    for seed in range(6):
        write_expert(folder / f"e{seed}", model, TARGETS[kind], 2, seed)
    return network_of(kind, gate, experts=str(folder))


@contextmanager
def general_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_inputs.SharedInput, "update", lambda *_: None)
        yield


@pytest.fixture(params=FORMS)
def sizes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Number of layers of each quick computation."""
    return count_updates(monkeypatch, request.param)


CASES = [("llama", partial(RadarGate, top_k=2)), ("llama", StretchGate), ("t5", partial(RadarGate, top_k=1))]
OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "choices": {"num_beams": 2, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("network", CASES, indirect=True, ids=["llama-radar", "llama-stretch", "t5"])
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_are_those_of_the_general_path(network: GatedNetwork, options: str, sizes: list[int]) -> None:
    prompts = prompts_of("t5" if network.is_encoder_decoder else "llama")
    settings = {**FIXED_LENGTH, "max_new_tokens": NEW, "min_new_tokens": NEW, **OPTIONS[options]}
    with general_path():
        expected = network.generate(**prompts, **settings)
    assert not sizes
    for _ in range(2):
        assert torch.equal(network.generate(**prompts, **settings), expected)
    with torch.inference_mode():
        assert torch.equal(network.generate(**prompts, **settings), expected)
    if options != "no cache":  # then every step reads all tokens
        assert sizes
        assert 0 not in sizes


@pytest.mark.parametrize("network", CASES[:1], indirect=True)
def test_projections_of_one_input_are_computed_together(network: GatedNetwork, sizes: list[int]) -> None:
    network.generate(**prompts_of("llama"), **FIXED_LENGTH)
    assert set(sizes) == {2, 3}, "gate and up; q, k and v"


@pytest.mark.parametrize("network", CASES[:1], indirect=True)
def test_a_gate_state_loaded_between_generations_is_used(network: GatedNetwork) -> None:
    prompts, settings = prompts_of("llama"), {**FIXED_LENGTH, "max_new_tokens": NEW, "min_new_tokens": NEW}
    state = {key: value.clone() for key, value in network.gate_state().items()}
    first = network.generate(**prompts, **settings)
    network.load_gate_state({key: 0.3 * torch.randn_like(value) for key, value in state.items()})
    other = network.generate(**prompts, **settings)
    assert not torch.equal(other, first)
    with general_path():
        assert torch.equal(network.generate(**prompts, **settings), other)
    network.load_gate_state(state)
    assert torch.equal(network.generate(**prompts, **settings), first)
