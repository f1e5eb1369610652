"""The table of parts: dtypes and bytes against the tensors themselves, the optimiser's against its real state."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import adapters, expert_lm, fit, gated_lm
from torch import nn

from radargate_pl.callbacks.parts_table import Part, PartsTable, format_parts, network_parts, optimiser_part
from radargate_pl.callbacks.run_summary import count_parameters
from radargate_pl.gates import RadarGate, UniformGate
from radargate_pl.precision import Float32Module


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def printed(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("radargate_pl.callbacks.parts_table.rank_zero_info", lines.append)
    return lines


def cells(table: str) -> dict[str, list[str]]:
    """Name of each row -> its other cells."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


class GradientTypes(Callback):
    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen |= {p.grad.dtype for p in pl_module.parameters() if p.grad is not None}


def state_tensors(optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_gates_and_optimiser_are_float32_under_bfloat16(library, tmp_path, printed, precision):
    lm, gradients = gated_lm(library), GradientTypes()
    run = fit(lm, tmp_path, PartsTable(), gradients, steps=2, precision=precision)
    narrow = "bfloat16" if precision == "bf16-true" else "float32"
    (table,) = printed
    found = cells(table)
    assert found["backbone"][:2] == [narrow, "no"]
    assert found["experts"][:2] == [narrow, "no"]
    assert found["gates: scorer"][:2] == ["float32", "yes"]
    assert found["gates: rotation"][:2] == ["float32", "yes"]
    assert found["optimiser state"][0] == "float32"
    # The table says what is: the tensors the optimiser really works on, after two steps.
    gates = [p for layer in lm.network.layers.values() for p in layer.gate.parameters()]
    assert {p.dtype for p in gates} == gradients.seen == {torch.float32}
    assert {tensor.dtype for tensor in state_tensors(run.optimizers[0])} == {torch.float32}
    assert {id(p) for group in run.optimizers[0].param_groups for p in group["params"]} == {id(p) for p in gates}


def test_a_gate_that_was_cast_would_be_seen(library, tmp_path, monkeypatch):
    monkeypatch.setattr(Float32Module, "keeps_float32", False)
    lm = gated_lm(library)
    fit(lm, tmp_path, steps=1)
    lm.network.to(torch.bfloat16)
    dtypes = {part.name: part.dtypes for part in network_parts(lm.network)}
    assert dtypes["gates: scorer"] == dtypes["gates: rotation"] == ["bfloat16"]


def test_parameters_and_bytes_are_those_of_the_tensors(library, tmp_path, printed):
    gate = partial(RadarGate, top_k=2, temperature="learned", output_scale="learned")
    lm = gated_lm(library, gate)
    fit(lm, tmp_path, PartsTable(), steps=1)
    parts = {part.name: part for part in network_parts(lm.network)}
    layers = list(lm.network.layers.values())
    banks = [p for layer in layers for p in layer.bank.parameters()]
    rotations = [p for layer in layers for p in layer.gate.rotation.parameters()]
    scorers = [p for layer in layers for p in layer.gate.scorer.parameters()]
    seen = {id(p) for p in (*banks, *rotations, *scorers)}
    others = [p for layer in layers for p in layer.gate.parameters() if id(p) not in seen]
    gated = {id(p) for layer in layers for p in layer.gate.parameters()}
    backbone = [p for p in lm.network.parameters() if id(p) not in gated | {id(p) for p in banks}]
    assert others
    expected = {"experts": banks, "gates: rotation": rotations, "gates: scorer": scorers, "gates: other": others}
    for name, tensors in expected.items():
        assert parts[name].parameters == sum(p.numel() for p in tensors)
        assert parts[name].bytes == num_bytes(tensors)
    assert parts["backbone"].parameters == sum(p.numel() for p in backbone)
    assert parts["backbone"].bytes == num_bytes([*backbone, *lm.network.buffers()])
    counted = count_parameters(lm.network)
    assert sum(part.parameters for part in parts.values()) == counted["trainable"] + counted["frozen"]
    assert sum(part.parameters for part in parts.values() if part.trains) == counted["trainable"]
    assert cells(printed[0])["total"][0] == f"{counted['trainable'] + counted['frozen']:,}"


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_experts_that_train_are_float32_in_a_row_that_says_so(tmp_path, printed, precision):
    lm = expert_lm(partial(torch.optim.AdamW, lr=1e-3))
    run = fit(lm, tmp_path, PartsTable(), steps=3, precision=precision)
    found = cells(printed[0])
    assert found["experts"][:2] == ["float32", "yes"]
    assert found["optimiser state"][0] == "float32"
    assert {tensor.dtype for tensor in state_tensors(run.optimizers[0])} == {torch.float32}


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=1e-3),
        partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
        partial(torch.optim.Adam, lr=1e-3, fused=True),
        partial(torch.optim.SGD, lr=1e-3),
        partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
        partial(torch.optim.Adafactor, lr=1e-3),
        partial(torch.optim.RMSprop, lr=1e-3, centered=True),
    ],
    ids=["adamw", "amsgrad", "fused", "sgd", "momentum", "adafactor", "rmsprop"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optimiser_state_is_known_before_its_first_step(optimizer, dtype):
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (4, 3), (5,), ())]
    made = optimizer([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:]}])
    before = [p.detach().clone() for p in parameters]
    told = optimiser_part(made)
    assert not made.state
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for p in parameters:
        p.grad = torch.ones_like(p)
    made.step()
    there = state_tensors(made)
    assert told.bytes == num_bytes(there)
    assert set(told.dtypes) == {str(tensor.dtype).removeprefix("torch.") for tensor in there}


def test_an_optimiser_that_cannot_be_tried_is_named(library, tmp_path, printed):
    class Stubborn(torch.optim.SGD):
        def step(self, closure=None):
            if closure is None:
                raise RuntimeError("needs a closure")
            return super().step(closure)

    fit(gated_lm(library, optimizer=partial(Stubborn, lr=0.1)), tmp_path, PartsTable(), steps=1)
    assert printed[0].endswith("optimiser state: unknown before the first step of Stubborn")


def test_the_table_is_printed_once_and_a_gate_without_parameters_has_no_row(library, tmp_path, printed):
    table = PartsTable()
    lm = expert_lm(partial(torch.optim.SGD, lr=0.1))
    run = fit(lm, tmp_path, table, steps=1)
    table.on_fit_start(run, lm)
    assert len(printed) == 1
    assert not [name for name in cells(printed[0]) if name.startswith("gates")]
    network = gated_lm(library, UniformGate).network_factory({})
    assert {part.name for part in network_parts(network)} == {"backbone", "experts"}


def test_columns_line_up():
    rows = [Part("backbone", False, 1_234_567, {"bfloat16": 2_469_134, "float32": 64}), Part("experts", True, 8, {})]
    assert format_parts(rows).splitlines() == [
        "part      dtype               trains  parameters    bytes",
        "backbone  bfloat16 + float32  no       1,234,567  2.47 MB",
        "experts                       yes              8      0 B",
        "total                                  1,234,575  2.47 MB",
    ]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_backbone_counts_its_own_numbers_and_all_its_bytes(library, quantization):
    pytest.importorskip("bitsandbytes")
    wide = network_parts(gated_lm(library).network_factory({}))
    narrow = network_parts(gated_lm(library, quantization=quantization).network_factory({}))
    assert [(part.name, part.parameters) for part in wide] == [(part.name, part.parameters) for part in narrow]
    assert narrow[0].bytes < wide[0].bytes
    assert narrow[1:] == wide[1:]


def test_a_four_bit_weight_has_its_scales_beside_it():
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    weight = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    (part,) = network_parts(holder)
    assert part.parameters == 64 * 128
    assert part.bytes_of["uint8"] >= 64 * 128 // 2
    scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert part.bytes == num_bytes([packed, *scales])
