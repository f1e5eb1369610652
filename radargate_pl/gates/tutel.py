"""Tutel's gates: a linear or cosine scorer, softmax before the selection, noise while training (layer 1)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing
from radargate_pl.gates.scorers import InputScorer
from radargate_pl.gates.stretch import check_top_k
from radargate_pl.initialization import generator_for
from radargate_pl.ops import gate_dtype, select_top_k
from radargate_pl.precision import Float32Module
from radargate_pl.rotations import NoRotation, Rotation
from radargate_pl.site import Site

MAX_SCALE = 100.0
START_SCALE = 2.0
NORM_EPS = 1e-12


class CosineScorer(Float32Module):
    """Logits from angles: ``exp(min(t, log 100)) cos(W_p x + b_p, s_e)`` (in * p + p + p * E + 1 parameters).

    ``weight`` (p, in) and ``bias`` (p,) start like a linear layer, ``similarity`` (E, p) from N(0, 0.01^2), ``scale``
    (1,) is t and starts at log 2.

    Args:
        site: the layer.
        projection: width p of the space in which angles are measured.

    Source: microsoft/tutel, gates/cosine_top.py.
    """

    reads_latents = False

    def __init__(self, site: Site, projection: int) -> None:
        super().__init__()
        generator, bound = generator_for(site.path, "scorer"), 1 / math.sqrt(site.in_features)
        weight = torch.empty(projection, site.in_features, dtype=torch.float32)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        bias = torch.empty(projection, dtype=torch.float32)
        self.bias = nn.Parameter(bias.uniform_(-bound, bound, generator=generator))
        similarity = torch.empty(len(site.experts), projection, dtype=torch.float32)
        self.similarity = nn.Parameter(similarity.normal_(0, 0.01, generator=generator))
        self.scale = nn.Parameter(torch.full((1,), math.log(START_SCALE), dtype=torch.float32))

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank) -> Tensor:
        """Score all experts: x (..., in) to logits (..., E), float32."""
        projected = F.linear(x.to(gate_dtype(x.dtype)), self.weight, self.bias)
        cosines = F.linear(_unit(projected), _unit(self.similarity))
        return self.scale.clamp(max=math.log(MAX_SCALE)).exp() * cosines


class TutelGate(Gate):
    """Softmax over all experts, then the ``top_k`` largest, dropless: every token keeps all its experts.

    For ``top_k`` above 1 and with ``normalize`` kept probabilities are divided by their sum; for 1 the probability
    stays as it is. While training ``noise * N(0, 1) / E`` is added to the logits; the noisy ones are recorded. Tutel's
    load-balancing loss is ``gshard`` among the auxiliary losses. Capacity, which drops tokens, is not built.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token; a layer with fewer experts keeps all of them.
        kind: "linear" scores by ``x W_g``, "cosine" by the angle between a projection of x and a vector per expert.
        projection: width of that projection ("cosine" only).
        normalize: whether kept probabilities are divided by their sum where ``top_k`` is above 1.
        noise: size of the noise on the logits while training.
        rotation: what is done to kept outputs before they are summed.

    Raises:
        ValueError: for values out of range and unknown names.

    Source: Tutel, arXiv 2206.03382, and microsoft/tutel, gates/top.py, gates/cosine_top.py, impls/fast_dispatch.py.
    """

    reads_latents = False

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        kind: Literal["linear", "cosine"] = "linear",
        projection: int = 256,
        normalize: bool = True,
        noise: float = 0.0,
        rotation: Callable[[Site], Rotation] = NoRotation,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if kind not in ("linear", "cosine"):
            raise ValueError(f"Expected kind to be 'linear' or 'cosine', but got {kind!r}.")
        if projection < 1:
            raise ValueError(f"Expected projection to be at least 1, but got {projection}.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"Expected noise to be at least 0 and finite, but got {noise}.")
        self.top_k, self.kind, self.projection = top_k, kind, projection
        self.normalize, self.noise = normalize, noise
        self.scorer = CosineScorer(site, projection) if kind == "cosine" else InputScorer(site)
        self.rotation = rotation(site)

    def bind(self, bank: ExpertBank) -> None:
        """Refuse a ``top_k`` above the number of experts in the library."""
        check_top_k(self.top_k, bank)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Score, select and weigh the experts; see `Gate.forward`."""
        logits = self.scorer(x, latents, bank)
        if self.training and self.noise:
            logits = logits + self.noise / logits.shape[-1] * torch.randn_like(logits)
        weights, indices = select_top_k(logits, self.top_k, renormalize=self.normalize and self.top_k > 1)
        return Routing(weights, indices, logits)


def _unit(v: Tensor) -> Tensor:
    # Not F.normalize: its gradient is 1e12 where v is zero.
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + NORM_EPS)
