"""What every gate is: the interface a layer talks to (layer 1)."""

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from radargate_pl.arguments import arguments_of, line_of
from radargate_pl.experts import ExpertBank
from radargate_pl.precision import Float32Module
from radargate_pl.rotations import NoRotation, Rotation
from radargate_pl.site import Site


@dataclass
class Context:
    """What gates know about the batch; one per network, replaced by the next forward and never cleared.

    Clearing it after the forward would break the recomputation of activation checkpointing, or silently change its
    gradients.

    Attributes:
        expert: library id of each example's own expert, (examples,) int64, -1 for none; beams and choices repeat rows
            side by side.
        tokens: stream name to the mask of real tokens, (examples, length) bool.
        active: the distinct ids in ``expert``, read once per batch so that no layer waits for the device.
        is_over: whether the call that they were given for has ended.
        threads: those inside such a call, once for each call.
    """

    expert: Tensor | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    active: tuple[int, ...] | None = None
    is_over: bool = False
    threads: list[int] = field(default_factory=list)

    def replace(self, expert: Tensor | None = None, tokens: dict[str, Tensor] | None = None) -> None:
        """Take over the ids and masks of the next batch."""
        self.expert = expert
        self.tokens = tokens or {}
        self.active = None if expert is None else tuple(sorted(set(expert.tolist()) - {-1}))
        self.is_over = False

    @contextmanager
    def batch(self, expert: Tensor | None = None, tokens: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Hold ids and masks for what is called inside the block; the backbone by itself gets none behind it.

        Args:
            expert: as in the attributes.
            tokens: as in the attributes.

        Raises:
            RuntimeError: another thread is inside a call with ids or masks of its own.
        """
        if torch.compiler.is_compiling():
            self.replace(expert, tokens)
            yield
            self.is_over = True
            return
        own, knows = threading.get_ident(), expert is not None or tokens or self.expert is not None or self.tokens
        if knows and any(thread != own for thread in self.threads):
            raise RuntimeError(
                "Expected one thread at a time inside a network whose batches carry expert ids or masks, but another "
                "is inside. Guard the calls with a lock, or give each thread copy.deepcopy(network)."
            )
        self.threads.append(own)
        try:
            self.replace(expert, tokens)
            yield
        finally:
            self.is_over = True
            self.threads.remove(own)

    def leave_behind(self, *_: Any) -> None:
        """Forget what belongs to a call that has ended: a hook on what may be called by itself."""
        if self.is_over:
            self.replace()

    def held(self) -> Self:
        """Return a copy of what is known now, for what is recomputed later."""
        return type(self)(self.expert, self.tokens, self.active)

    def take(self, other: "Context") -> None:
        """Know what another one knows.

        Args:
            other: as `held` returned it.
        """
        self.expert, self.tokens, self.active = other.expert, other.tokens, other.active


class Routing(NamedTuple):
    """What a gate decides, in float32.

    Attributes:
        weights: factor of each kept expert, (..., K); 0 means not chosen. K = E when ``indices`` is ``None``.
        indices: local indices of the kept experts, (..., K) int64, or ``None`` for all in order.
        logits: scores before selection, temperature applied: their softmax is what auxiliary losses call the gate's
            probabilities, (..., E); ``None`` for gates without scores.
    """

    weights: Tensor
    indices: Tensor | None
    logits: Tensor | None


class Gate(Float32Module):
    """Scores and selects the experts of one layer; never touches anything ``out`` wide.

    A new gate writes one method, `forward`, and stores every constructor argument under its own name, so that a run can
    print and save exactly what was built.

    Args:
        site: the layer the gate is for.

    Attributes:
        rotation: what is done to the kept experts' outputs before they are summed.
        is_ragged: whether tokens may keep different numbers of experts.
        takes_new_experts: whether an expert can join a fitted gate without training.
        reads_latents: whether `forward` looks at the latents itself, beside handing them to a module ``scorer`` that
            says the same of its own; where it does not, a layer with many experts may pass latents of width 0. Counts
            for the `forward` of the class that says it: a subclass with another one reads them until it says otherwise.
        negates_one_factor: whether ``combine: separate`` puts the sign of a negative weight on B alone.
    """

    is_ragged = False
    takes_new_experts: bool = False
    reads_latents = True
    negates_one_factor = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.rotation: Rotation = NoRotation(site)

    def bind(self, bank: ExpertBank) -> None:
        """Look at the experts once, when the gate is attached (for prototypes and the like)."""

    def active(self, bank: ExpertBank, context: Context) -> tuple[int, ...] | None:
        """Return the local indices of the only experts that can be chosen in this batch; ``None`` means any.

        The other experts are not evaluated, and while experts train their gradients stay ``None``.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Decide the weights.

        Args:
            x: layer input, (..., in), the backbone's dtype.
            latents: latents of the experts (the active ones), (..., E, r), the experts' dtype.
            bank: the layer's experts.
            context: ids and masks of the batch.
        """

    def arguments(self) -> dict[str, Any]:
        """Return every constructor argument but the site, by name."""
        return arguments_of(self)

    def line(self) -> str:
        """Describe gate and rotation as built, in one line, e.g. ``RadarGate(top_k=2, scorer=x, ...)``."""
        return line_of(self)


def ignores_latents(gate: Gate) -> bool:
    """Tell whether nobody looks at the latents a gate is called with: neither it, its scorer nor a hook on them."""
    scorer = getattr(gate, "scorer", None)
    return _says_so(gate) and (scorer is None or _says_so(scorer))


def _says_so(module: Any) -> bool:
    if getattr(module, "reads_latents", True) or not isinstance(module, nn.Module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    # What a class says of the forward it wrote is not said of the one a subclass puts in its place.
    author = next(vars(cls) for cls in type(module).__mro__ if {"reads_latents", "forward"} & vars(cls).keys())
    return "reads_latents" in author
