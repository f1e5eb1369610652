"""How much the update of tokens that keep their experts changes when one more expert joins a NexusGate.

    python benchmarks/joining_experts.py

Random experts of rank 8 at one layer 576 wide, 256 random tokens, float32. The projection is scaled to logits of
standard deviation 0.1, the rotation to angles near 0.2 radians. Prints median and largest relative change.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Context, NexusGate
from radargate_pl.moe import MoELinear, attach
from radargate_pl.ops import dense_weights
from radargate_pl.records import record_gates
from radargate_pl.rotations import NoRotation, RadarRotation

WIDTH, RANK, TOKENS, LOGITS, ANGLES = 576, 8, 256, 0.1, 0.2


class OneLinear(nn.Module):
    """A model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.layer(x)


def model_of(count: int, top_k: int, rotates: bool, fitted: nn.Module | None) -> nn.Module:
    """A model with the first `count` experts; its gate takes over the parameters of a fitted one."""
    model, generator = OneLinear(), torch.Generator().manual_seed(0)
    nn.init.zeros_(model.layer.weight)  # what comes out is the update alone
    lora_A, lora_B = {}, {}
    for index in range(count):
        lora_A[f"e{index}"] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
        lora_B[f"e{index}"] = torch.randn(WIDTH, RANK, generator=generator) / RANK**0.5
    rotation = RadarRotation if rotates else NoRotation
    gate = partial(NexusGate, top_k=top_k, domains="prototype", rotation=rotation)
    bank = ExpertBank(lora_A, lora_B, dict.fromkeys(lora_A, 1.0))
    (layer,) = attach(model, {"layer": bank}, gate, context=Context()).values()
    if fitted is not None:
        layer.gate.projection.load_state_dict(fitted.gate.projection.state_dict())
        layer.gate.rotation.load_state_dict(fitted.gate.rotation.state_dict())
    return model.eval()


@torch.no_grad()
def fit(layer: MoELinear, model: nn.Module, x: Tensor) -> None:
    """Scale logits and angles of an untrained gate to what fitted ones have."""
    if isinstance(layer.gate.rotation, RadarRotation):
        nn.init.normal_(layer.gate.rotation.Q, generator=torch.Generator().manual_seed(2))
    for _ in range(2):  # the angles' scale is exact at once, the logits' too: both are linear
        with record_gates(model, angles=["layer"]) as outputs:
            model(x)
        layer.gate.projection.down.mul_(LOGITS / outputs["layer"].logits.std())
        if outputs["layer"].angles is not None:
            layer.gate.rotation.Q.mul_(ANGLES / outputs["layer"].angles.square().mean().sqrt())


@torch.no_grad()
def change(count: int, top_k: int, rotates: bool) -> tuple[float, float]:
    """Median and largest relative change of the update when an expert joins `count` others."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    before = model_of(count, top_k, rotates, None)
    fit(before.layer, before, x)
    after = model_of(count + 1, top_k, rotates, before.layer)
    updates, kept = [], []
    for model in (before, after):
        with record_gates(model) as outputs:
            updates.append(model(x))
        output = outputs["layer"]
        kept.append(dense_weights(output.weights, output.indices, len(output.experts)) > 0)
    same = (kept[1][:, :count] == kept[0]).all(-1) & ~kept[1][:, count]
    relative = (updates[1] - updates[0]).norm(dim=-1)[same] / updates[0].norm(dim=-1)[same]
    return float(relative.median()), float(relative.max())


def main(counts: Sequence[int] = (5, 9, 40)) -> None:
    """Prints the table."""
    torch.manual_seed(0)
    print("| experts | k = 2 | k = 1 | k = 2, rotated | k = 1, rotated |\n|---|---:|---:|---:|---:|")
    for count in counts:
        cells = [change(count, top_k, rotates) for rotates in (False, True) for top_k in (2, 1)]
        print(f"| {count} to {count + 1} | {' | '.join(f'{median:.3g} ({top:.3g})' for median, top in cells)} |")


if __name__ == "__main__":
    main()
