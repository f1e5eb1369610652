"""Experts that train: parameters of their own instead of one stacked tensor (layer 1)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.ops import gate_dtype


class TrainableExpertBank(ExpertBank):
    """An `ExpertBank` whose experts train, in float32.

    Each expert is a parameter pair of its own, ``lora_A.<expert>`` (r_i, in) and ``lora_B.<expert>`` (out, r_i),
    unpadded: the gradient of an expert that a batch does not use stays ``None``. Slices of one stacked parameter would
        get zeros
    instead and drift by the optimiser's momentum. Experts given the very same A tensor share one parameter (HydraLoRA).

    Args and errors: those of `ExpertBank`.
    """

    trainable = True
    keeps_float32 = True
    lora_A: nn.ParameterDict  # type: ignore[assignment]
    lora_B: nn.ParameterDict  # type: ignore[assignment]

    def _store(self, lora_A: list[Tensor], lora_B: list[Tensor]) -> None:
        self.lora_A = self._parameters_of(lora_A)
        self.lora_B = self._parameters_of(lora_B)

    def _parameters_of(self, weights: list[Tensor]) -> nn.ParameterDict:
        made: dict[int, nn.Parameter] = {}
        for weight in weights:
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(weight.detach().to(gate_dtype(weight.dtype)).clone())
        return nn.ParameterDict({state_key(n): made[id(w)] for n, w in zip(self.names, weights, strict=True)})

    def expert_weights(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (r_i, in) and B (out, r_i) of one expert: the parameters themselves."""
        return self.lora_A[state_key(name)], self.lora_B[state_key(name)]

    def _padded_B(self, index: int) -> Tensor:
        return self._pad(self.expert_weights(self.names[index])[1], 1)

    def _stacked_A(self, active: tuple[int, ...] | None) -> Tensor:
        chosen = (0,) if self.shares_A else self._chosen(active)
        return torch.cat([self._pad(self.expert_weights(self.names[index])[0], 0) for index in chosen])

    def _stacked_B(self, active: tuple[int, ...] | None) -> Tensor:
        return torch.cat([self._padded_B(index) for index in self._chosen(active)], dim=1)

    def _chosen(self, active: tuple[int, ...] | None) -> tuple[int, ...]:
        return tuple(range(self.num_experts)) if active is None else active

    def cached(self, name: str, build: Callable[[], Tensor], *settings: object) -> Tensor:
        """Return what ``build`` makes: B changes with every step."""
        return build()


def state_key(name: str) -> str:
    """Return the expert's name as it stands in state-dict keys.

    A dot would start a new level there, and names of ``nn.ParameterDict``'s own ("training", "keys") would replace its
    attributes: both are written as ``%`` and two hexadecimal digits, like in a URL.

    Example:
        >>> state_key("qwen2.5-maths"), state_key("training")
        ('qwen2%2E5-maths', '%74raining')
    """
    escaped = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(name[0]):02X}{name[1:]}" if hasattr(nn.ParameterDict(), escaped) else escaped
