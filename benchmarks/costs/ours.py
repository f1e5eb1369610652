"""The one place that knows how this package is switched: networks and layers in every mode."""

import importlib
import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from costs.backbones import ALPHA, SharedWeights, experts_of
from costs.case import Setting, UnavailableError
from costs.rows import GATES, Row
from radargate_pl import networks
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Context, LoraHub, RadarGate, UniformGate
from radargate_pl.moe import MoELinear, attach
from radargate_pl.networks import GatedNetwork
from radargate_pl.rotations import RadarRotation


class Mode(NamedTuple):
    """How a network runs: the arguments of `Execution`."""

    mixture: str
    compile: bool
    attention: str


MODES = {
    "plain": Mode("plain", False, "model"),
    "torch": Mode("torch", False, "model"),
    "eager": Mode("auto", False, "model"),
    "grouped": Mode("auto", False, "grouped"),
    "compiled": Mode("auto", True, "auto"),
}
# Experts that files of configs/gates name.
NAMES = ("gsm8k", "aqua")
ANGLES = 0.02  # standard deviation of Q: angles of trained gates are not zero


def network_of(row: Row, setting: Setting, weights: SharedWeights) -> GatedNetwork:
    """Build a network: the bare backbone, one LoRA that trains, or a gate over frozen experts.

    Raises:
        UnavailableError: this version of the package cannot run in the row's mode.
    """
    experts = {} if row.kind in ("floor", "naive") else experts_of(row, weights.model, setting, NAMES)
    options: dict[str, Any] = {"experts": experts or []}
    if row.kind == "own-lora":
        options |= {"gate": UniformGate, "train": "experts"}  # the weight of one is 1
    elif experts:
        options["gate"] = gate_of(row)
    network = GatedNetwork(backbone=setting.backbone, dtype=setting.dtype, **options, **_execution(MODES[row.mode]))
    weights.share(network.backbone)
    network.to(setting.device).train()
    for seed, layer in enumerate(network.layers.values()):
        choose_mixture(layer, MODES[row.mode])
        wake(layer, seed)
    return network


def gate_of(row: Row) -> Any:
    """The gate of a file of configs/gates; RadarGate with the row's k and scorer."""
    if row.gate == "radargate":
        return partial(RadarGate, top_k=row.k or row.n, scorer=row.scorer)
    spec = _config_of(row)["network"]["init_args"]["gate"]
    module, _, name = spec["class_path"].rpartition(".")
    return partial(getattr(importlib.import_module(module), name), **spec.get("init_args", {}))


def auxiliary_losses_of(row: Row) -> dict[str, float]:
    """The auxiliary losses that the gate's file asks for."""
    return {} if row.gate == "radargate" else _config_of(row).get("auxiliary_losses", {})


def layer_of(row: Row, setting: Setting, linear: nn.Linear) -> MoELinear:
    """One layer of random experts with RadarGate beside a linear layer."""
    generator = torch.Generator().manual_seed(setting.seed)
    (out, width), rank = linear.weight.shape, setting.rank
    lora_A, lora_B = {}, {}
    for index in range(row.n):
        lora_A[f"e{index}"] = torch.randn(rank, width, generator=generator).to(linear.weight) / width**0.5
        lora_B[f"e{index}"] = torch.randn(out, rank, generator=generator).to(linear.weight) * 0.01
    bank = ExpertBank(lora_A, lora_B, dict.fromkeys(lora_A, ALPHA / rank))
    model = nn.ModuleDict({"layer": linear})
    (layer,) = attach(model, {"layer": bank}, gate_of(row), context=Context()).values()
    choose_mixture(layer, MODES[row.mode])
    wake(layer, 0)
    return layer


def compiled_facts(network: GatedNetwork) -> dict[str, Any]:
    """What compiling cost, once the network has run.

    Raises:
        UnavailableError: nothing was compiled, or it failed.
    """
    applied: Any = network.applied_execution  # type: ignore[attr-defined]
    if applied.compiled is None or applied.compiled.failure is not None:
        raise UnavailableError(f"not compiled: {getattr(applied.compiled, 'failure', applied.compilation)}")
    return {"compile_seconds": applied.compiled.seconds, "graphs": applied.compiled.graphs}


def wake(layer: MoELinear, seed: int) -> None:
    """Move a fresh gate away from its zeros: angles and LoraHub's weights start there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(layer.gate.rotation, RadarRotation):
            angles = torch.randn(layer.gate.rotation.Q.shape, generator=generator) * ANGLES
            layer.gate.rotation.Q.copy_(angles)
        if isinstance(layer.gate, LoraHub):
            layer.gate.weights.fill_(1 / len(layer.gate.weights))


def choose_mixture(layer: MoELinear, mode: Mode) -> None:
    """Choose the code path of a layer, where this version of the package has several."""
    if hasattr(layer, "mixture"):
        layer.mixture = mode.mixture


def _execution(mode: Mode) -> dict[str, Any]:
    if "execution" in inspect.signature(GatedNetwork.__init__).parameters:
        execution: Any = networks.Execution  # type: ignore[attr-defined]
        return {"execution": execution(mixture=mode.mixture, compile=mode.compile, attention=mode.attention)}
    if mode in (MODES["plain"], MODES["torch"], MODES["eager"]):
        return {}
    raise UnavailableError("this version of GatedNetwork takes no execution options")


def _config_of(row: Row) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((GATES / f"{row.gate}.yaml").read_text())["model"]
    return config
