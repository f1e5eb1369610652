"""Nexus: a gate whose experts are known by what they were trained on, so that new ones can join (layer 1)."""

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing
from radargate_pl.gates.stretch import check_top_k
from radargate_pl.initialization import generator_for
from radargate_pl.notices import say_once
from radargate_pl.ops import gate_dtype, select_top_k
from radargate_pl.precision import Float32Module
from radargate_pl.prototypes import prototypes
from radargate_pl.remembered import Remembered
from radargate_pl.rotations import NoRotation, Rotation
from radargate_pl.site import Site

DomainSource = Literal["auto", "data", "prototype"]
COMMAND = "python -m radargate_pl.domain_command --backbone BACKBONE --experts FOLDER --tasks TASK [TASK ...]"
# Experts are scored so many at a time, the last ones beside zeros. The sums inside a GEMM depend on its shape, which
# then does not change when an expert joins: the scores of the others stay the same to the last bit.
BLOCK = 16


class DomainProjection(Float32Module):
    """From an expert's domain to its place among layer inputs: ``e = W_2 SwiGLU(W_1 d)`` (2 l m + h l parameters).

    ``up`` is W_1 (2 l, m), ``down`` W_2 (h, l); ``SwiGLU(a, b) = silu(a) b``. The paper says nothing of their start
    (INFERRED): W_1 uniform in +-1, since d has norm 1, and W_2 in +-1/sqrt(l h), so that logits start below those of a
    linear scorer.

    Args:
        site: the layer; h is the width of its input.
        width: m, of the domain embeddings.
        hidden: l.

    Source: Nexus, arXiv 2408.15901, section 3; its printed shapes of W_1 and W_2 do not fit together, these do.
    """

    def __init__(self, site: Site, width: int, hidden: int) -> None:
        super().__init__()
        generator, bound = generator_for(site.path, "nexus"), 1 / math.sqrt(hidden * site.in_features)
        up = torch.empty(2 * hidden, width, dtype=torch.float32)
        down = torch.empty(site.in_features, hidden, dtype=torch.float32)
        self.up = nn.Parameter(up.uniform_(-1, 1, generator=generator))
        self.down = nn.Parameter(down.uniform_(-bound, bound, generator=generator))
        self._remembered = Remembered()

    def forward(self, domains: Tensor) -> Tensor:
        """Project domain embeddings (n, m) to expert embeddings (n, h); a zero row stays zero."""
        gate, value = F.linear(domains, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.down)

    def in_blocks(self, domains: Tensor) -> Tensor:
        """Project domain embeddings (n, m), 16 at a time, to (n and zeros up to a multiple of 16, h).

        What comes out is kept in evaluation mode without gradients, until the domains or the projection change.
        """

        def project() -> Tensor:
            padded = F.pad(domains, (0, 0, 0, -domains.shape[0] % BLOCK))
            return torch.cat([self(block) for block in padded.split(BLOCK)])

        if self.training or torch.is_grad_enabled():
            return project()
        return self._remembered.get((domains, self.up, self.down), project)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._remembered.forget()
        return super()._apply(fn, recurse)


class NexusGate(Gate):
    """Softmax over ``x . e_i``, where ``e_i`` is projected from a fixed embedding ``d_i`` of the expert's domain.

    Only the projection trains and it knows nothing of the number of experts: a new one joins with its ``d_i`` and
    without training. ``d_i`` is the domain embedding of the expert's training data, or its prototype (the layer input
    its update answers to most strongly). For ``top_k`` above 1 kept probabilities are divided by their sum, so that a
    token whose kept experts stay the same does not notice the new one; at 1 the probability stays as it is. A rotation
    that looks at all experts' outputs does notice.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token; a layer with fewer experts keeps all of them.
        hidden: width l inside the projection; a quarter of the layer's input where not given.
        domains: where ``d_i`` come from: "data", "prototype", or "auto": data if every expert of the library has some,
            else prototypes. Once attached to its layer, the gate names the source that was taken.
        rotation: what is done to kept outputs before they are summed.

    Attributes:
        domain_embeddings: ``d_i`` of the experts present, (E, m) float32; saved with the gate, never trained.

    Raises:
        ValueError: for values out of range and unknown names; in `bind`, when experts lack what ``domains`` asks for.

    Source: Nexus, arXiv 2408.15901, section 3; prototypes and ``top_k`` above 1 (with Tutel's rule) are ours.
    """

    takes_new_experts = True
    projection: DomainProjection
    domain_embeddings: nn.Parameter

    def __init__(
        self,
        site: Site,
        top_k: int = 1,
        hidden: int | None = None,
        domains: DomainSource = "auto",
        rotation: Callable[[Site], Rotation] = NoRotation,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if hidden is not None and hidden < 1:
            raise ValueError(f"Expected hidden to be at least 1, but got {hidden}.")
        if domains not in ("auto", "data", "prototype"):
            raise ValueError(f"Expected domains to be 'auto', 'data' or 'prototype', but got {domains!r}.")
        self.top_k, self.hidden, self.domains = top_k, hidden, domains
        self.rotation = rotation(site)

    def bind(self, bank: ExpertBank) -> None:
        """Look up the experts' domains and make the projection, whose width they decide."""
        check_top_k(self.top_k, bank)
        self.domains, embeddings = domain_embeddings(bank, self.domains, self.site)
        self.domain_embeddings = nn.Parameter(embeddings.to(torch.float32), requires_grad=False)
        hidden = max(1, self.site.in_features // 4) if self.hidden is None else self.hidden
        self.projection = DomainProjection(self.site, embeddings.shape[1], hidden)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Score by the expert embeddings, select and weigh; see `Gate.forward`."""
        wide, blocks = x.to(gate_dtype(x.dtype)), self.expert_embeddings().split(BLOCK)
        logits = torch.cat([F.linear(wide, block) for block in blocks], dim=-1)[..., : bank.num_experts]
        weights, indices = select_top_k(logits, self.top_k, renormalize=self.top_k > 1)
        return Routing(weights, indices, logits)

    def expert_embeddings(self) -> Tensor:
        """Return ``e_i`` of the experts, then zeros up to a multiple of 16: (.., h)."""
        return self.projection.in_blocks(self.domain_embeddings)


def domain_embeddings(bank: ExpertBank, source: DomainSource, site: Site) -> tuple[DomainSource, Tensor]:
    """Return the domain embeddings of a layer's experts and where they come from.

    Whether there are enough is asked of the whole library, so that all layers answer the same.

    Args:
        bank: the experts; ``bank.domains`` holds the embeddings of their data.
        source: "data", "prototype" or "auto".
        site: the layer, for messages.

    Returns:
        "data" or "prototype", and the embeddings, (E, m).

    Raises:
        ValueError: for "data" when experts have none, for embeddings of different widths, and for prototypes of experts
            that are still to be trained.
    """
    given = bank.domains or {}
    without = [name for name in bank.library if name not in given]
    if source == "data" and without:
        raise ValueError(
            f"NexusGate: expected every expert to have a domain embedding, but {without} have none. Make them with "
            f"`{COMMAND}`, or choose domains: prototype."
        )
    if source == "prototype" or without:
        if source == "auto":
            say_once(
                f"NexusGate knows experts by their prototypes, since {without} have no domain embedding. Make them "
                f"with `{COMMAND}`, or choose domains: prototype."
            )
        found = prototypes(bank)
        if bank.trainable and not found.any():
            raise ValueError(
                f"NexusGate at {site.path}: expected experts with prototypes, but these are new and start at zero. "
                "Train them first, or choose another gate."
            )
        return "prototype", found
    widths = {name: tuple(given[name].shape) for name in bank.names}
    if len(set(widths.values())) > 1:
        raise ValueError(f"NexusGate: expected domain embeddings of one width, but got {widths}. Make them anew.")
    return "data", torch.stack([given[name] for name in bank.names])
