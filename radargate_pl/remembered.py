"""A value computed from weights, kept until any of them changes (layer 0)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Remembered:
    """Remembers one tensor together with the weights, their versions and the settings that it was computed from.

    A weight that was written to (an optimiser step, a load), replaced, given other memory (``weight.data = ...``) or
    moved is noticed. Writing through ``weight.data`` (``weight.data.mul_(2)``) is not supported: it leaves no trace.
    Nothing is remembered of weights made in inference mode, where writes are not counted.
    """

    def __init__(self) -> None:
        self._weights: list[tuple[Tensor, int, int, Tensor]] = []
        self._settings: tuple[object, ...] = ()
        self._value: Tensor | None = None

    def __reduce__(self) -> tuple[type["Remembered"], tuple[()]]:
        """Copy and pickle as a fresh one: copied weights count their versions anew, and an old value could fit them."""
        return Remembered, ()

    def get(self, weights: Sequence[Tensor], build: Callable[[], Tensor], settings: tuple[object, ...] = ()) -> Tensor:
        """Return what ``build`` made of these weights and settings, built again only if one of them changed since.

        Args:
            weights: all tensors that ``build`` reads.
            build: called without gradients.
            settings: whatever else it reads.
        """
        if any(weight.is_inference() for weight in weights):
            return build()
        if self._value is None or settings != self._settings or not self._is_current(weights):
            # Lightning validates in inference mode: a tensor made there could not be trained through afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._value = build()
                # As long as the memory is held, nothing new can lie at the same address.
                self._weights = [(weight, weight._version, weight.data_ptr(), weight.detach()) for weight in weights]
            self._settings = settings
        return self._value

    def _is_current(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) == len(self._weights) and all(
            weight is before and weight._version == version and weight.data_ptr() == pointer
            for weight, (before, version, pointer, _) in zip(weights, self._weights, strict=True)
        )

    def forget(self) -> None:
        """Drop the value; for changes that leave no trace, such as some of `nn.Module.to`."""
        self._weights, self._settings, self._value = [], (), None


class Prepared:
    """A tensor that compiled graphs read and cannot make; copies and pickles are without it.

    Attributes:
        value: ``None`` where nothing was prepared.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __reduce__(self) -> tuple[type["Prepared"], tuple[()]]:
        return Prepared, ()


class Changes:
    """Counts assignments to attributes of modules that inherit from `CountsChanges`."""

    count = 0


class CountsChanges(nn.Module):
    """A module whose assignments are counted, of parameters, submodules and plain settings alike.

    What was computed from many settings asks the one count before it looks at each of them again.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Changes.count += 1


class Snapshot:
    """Tells whether parameters and settings of modules are still those they were, unwritten and in their place.

    Args:
        modules: the modules, each one that `CountsChanges`; what lies below them belongs to them.
        settings: where each setting is kept, its name, its value.
    """

    def __init__(self, modules: Sequence[nn.Module], settings: Sequence[tuple[dict[str, Any], str, object]]) -> None:
        below = [module for root in modules for module in root.modules()]
        children = [(module._modules, name, child) for module in below for name, child in module._modules.items()]
        self._places = [*children, *settings]
        self._count = Changes.count
        self._parameters = [
            (module._parameters, name, parameter, parameter._version, parameter.data_ptr())
            for module in below
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        # As long as the memory is held, nothing new can lie at the same address.
        self._held = [parameter.detach() for _, _, parameter, _, _ in self._parameters]

    def is_current(self) -> bool:
        """Whether nothing was written, replaced or moved since."""
        if self._count != Changes.count:
            if any(owner.get(name) is not value for owner, name, value in self._places):
                return False
            self._count = Changes.count
        for parameters, name, parameter, version, pointer in self._parameters:
            unwritten = parameter._version == version and parameter.data_ptr() == pointer
            if not unwritten or parameters.get(name) is not parameter:
                return False
        return True
