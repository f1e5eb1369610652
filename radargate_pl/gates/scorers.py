"""Scorers: where a gate's logits come from (layer 1)."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.initialization import generator_for, uniform_parameter
from radargate_pl.ops import gate_dtype
from radargate_pl.precision import Float32Module
from radargate_pl.site import Site

ScorerName = Literal["x", "experts"]


class InputScorer(Float32Module):
    """Logits from the layer input: ``x theta^T`` (name "x"; E * in parameters).

    ``weight`` (E, in) starts uniform in +-1/sqrt(in): zeros would tie all experts, N(0, 0.02^2) saturates the softmax
    for many.

    Args:
        site: the layer.

    Source: arXiv 2505.23184, eq. 1.
    """

    config_name = "x"
    reads_latents = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = _uniform(site, site.in_features)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank) -> Tensor:
        """Score all experts: x (..., in) to logits (..., E), float32."""
        return F.linear(x.to(gate_dtype(x.dtype)), self.weight)


class ExpertsScorer(Float32Module):
    """Logits from all experts' outputs, ``LayerNorm(concat(v_i)) theta^T`` (name "experts"; E^2 * out parameters).

    Args:
        site: the layer.

    Source: arXiv 2505.23184, appendix B.2 (the normalisation is undefined there; parameter-free LayerNorm, eps 1e-8, is
        our reading) and MoLE, arXiv 2404.13628, eq. 9.
    """

    config_name = "experts"
    reads_latents = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = _uniform(site, len(site.experts) * site.out_features)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank) -> Tensor:
        """Score all experts from their latents (..., E, r): logits (..., E), float32."""
        return bank.layer_norm_logits(latents, self.weight)


def build_scorer(name: ScorerName, site: Site) -> InputScorer | ExpertsScorer:
    """Build a scorer by its name in the config.

    Raises:
        ValueError: for an unknown name.
    """
    scorers: dict[str, type[InputScorer | ExpertsScorer]] = {s.config_name: s for s in (InputScorer, ExpertsScorer)}
    if name not in scorers:
        raise ValueError(f"Expected scorer to be one of {sorted(scorers)}, but got {name!r}.")
    return scorers[name](site)


def _uniform(site: Site, fan_in: int) -> nn.Parameter:
    return uniform_parameter((len(site.experts), fan_in), fan_in, generator_for(site.path, "scorer"))
