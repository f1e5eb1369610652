"""How the kept experts' outputs become one update: MoLE's sum, OMoE's Gram-Schmidt, or merging A and B first (layer 2).

Everything works on latents and weights: no output of an expert is made here.
"""

import torch
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Gate, Routing
from radargate_pl.ops import dense_weights
from radargate_pl.rotations import NoRotation

RELATIVE_JITTER, ABSOLUTE_JITTER = 1e-6, 1e-12


class Combine:
    """The plain weighted sum ``sum_i g_i v_i`` of MoLE and HydraLoRA (name "sum").

    Attributes:
        has_basis: whether kept outputs are replaced by combinations of them, token by token.

    Source: arXiv 2404.13628, eq. 9-11; arXiv 2404.19245.
    """

    has_basis = False

    def check(self, gate: Gate, bank: ExpertBank) -> None:
        """Refuse gates and experts this cannot combine.

        Raises:
            ValueError: naming the layer and what does not fit.
        """

    def suited(self, gate: Gate) -> "Combine":
        """Return the form of this combination that the gate's weights ask for."""
        return self

    def arrange(self, routing: Routing) -> Routing:
        """Put the kept experts of every token into the order the combination needs."""
        return routing

    def latents(self, latents: Tensor, routing: Routing, bank: ExpertBank, active: tuple[int, ...] | None) -> Tensor:
        """Transform latents (..., E, r) before they are lifted."""
        return latents

    def basis(
        self, latents: Tensor, indices: Tensor | None, bank: ExpertBank, active: tuple[int, ...] | None
    ) -> Tensor | None:
        """Return what takes the place of each kept output, as coefficients over the kept outputs.

        Returns:
            (..., K, K): row j holds the coefficients of slot j; ``None`` when every output stays as it is.
        """
        return None


class GramSchmidt(Combine):
    r"""OMoE: the kept outputs are made orthogonal, in the order of the experts, before they are weighted and summed.

    ``q_j = v_j - sum_{l<j} <v_j, q_l> q_l / <q_l, q_l>`` and, with ``is_unit``, divided by its norm. With the k x k
    Gram ``K + (1e-6 tr(K) / k + 1e-12) I = L L^T`` this is ``Q = L^{-1} V`` (unit) or ``Q = diag(L) L^{-1} V``, so
    that no ``v_i`` is made. With kept lengths and k = 1 it equals MoLE. In float64, whatever the experts' dtype: the
    Gram squares the condition number.

    Only the abstract of OMoE was to be had: formula and order INFERRED from MOORE, the eps and lengths kept are ours.

    Args:
        is_unit: outputs of norm 1 ("gram_schmidt_unit", as in MOORE) instead of the length that is left
            ("gram_schmidt").

    Source: arXiv 2501.10062 (OMoE); MOORE, arXiv 2311.11385.
    """

    has_basis = True

    def __init__(self, is_unit: bool) -> None:
        self.is_unit = is_unit

    def check(self, gate: Gate, bank: ExpertBank) -> None:
        """Refuse gates that keep another number of experts for each token."""
        if gate.is_ragged:
            raise ValueError(
                f"Expected a gate that keeps equally many experts for every token with combine: gram_schmidt, but "
                f"{type(gate).__name__} at {gate.site.path} does not. Choose combine: sum, or another gate."
            )

    def arrange(self, routing: Routing) -> Routing:
        """Sort by expert: the result must not depend on the order of the weights."""
        if routing.indices is None or routing.indices.shape[-1] == 1:
            return routing
        indices, order = routing.indices.sort(dim=-1)
        return Routing(routing.weights.gather(-1, order), indices, routing.logits)

    def basis(
        self, latents: Tensor, indices: Tensor | None, bank: ExpertBank, active: tuple[int, ...] | None
    ) -> Tensor | None:
        """Return the rows of ``L^{-1}``, or of ``diag(L) L^{-1}``; see `Combine.basis`."""
        kept = bank.num_experts if indices is None else indices.shape[-1]
        if kept == 1 and not self.is_unit:
            return None
        gram = bank.gram(latents.double(), indices, active)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        jitter = RELATIVE_JITTER * diagonal.mean(-1) + ABSOLUTE_JITTER
        lower = torch.linalg.cholesky(gram + torch.diag_embed(jitter.unsqueeze(-1).expand_as(diagonal)))
        if not self.is_unit:
            lower = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        rows = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return rows.to(torch.promote_types(latents.dtype, torch.float32))


class SeparateSum(Combine):
    """A and B are summed apart, per token, and multiplied then: ``x (sum_i a_i A_i) (sum_j a_j B_j)``.

    ``a_i = g_i sqrt(s_i)``; unlike "sum" this has cross terms ``A_i B_j``. It is what LoraHub and PEMs do with constant
    weights, and what mttl's Arrow does by default (name "separate"). In rank space: ``h = sum_i a_i h_i``, then
    ``sum_j a_j h B_j``.

    Args:
        signs_both: whether a negative weight turns A and B, as in LoraHub; else B alone, as negation in PEMs does.

    Source: arXiv 2307.13269 (LoraHub), 2306.14870 (PEMs), 2405.11157 (Arrow, mttl's code).
    """

    def __init__(self, signs_both: bool = True) -> None:
        self.signs_both = signs_both

    def suited(self, gate: Gate) -> Combine:
        """Turn the sign of B alone where the gate negates; see `Combine.suited`."""
        return SeparateSum(signs_both=not gate.negates_one_factor)

    def check(self, gate: Gate, bank: ExpertBank) -> None:
        """Refuse rotations, which need each expert's own output, other ranks, and scalings that have no root."""
        if type(gate.rotation) is not NoRotation:
            raise ValueError(
                "Expected a gate without rotation with combine: separate, where no expert has an output of its own, "
                f"but {type(gate).__name__} at {gate.site.path} has {type(gate.rotation).__name__}. Use combine: sum."
            )
        if len(set(bank.ranks)) > 1:
            ranks = dict(zip(bank.names, bank.ranks, strict=True))
            raise ValueError(
                f"Expected experts of one rank with combine: separate, which adds their A and B, but at "
                f"{gate.site.path} found {ranks}. Choose combine: sum."
            )
        if min(bank.scaling) <= 0:
            raise ValueError(
                f"Expected scalings above 0 with combine: separate, which gives half of each to A, but at "
                f"{gate.site.path} found {dict(zip(bank.names, bank.scaling, strict=True))}. Choose combine: sum."
            )

    def latents(self, latents: Tensor, routing: Routing, bank: ExpertBank, active: tuple[int, ...] | None) -> Tensor:
        """Give every expert the summed latents; see `Combine.latents`."""
        weights = dense_weights(routing.weights, routing.indices, bank.num_experts)
        weights = weights if self.signs_both else weights.abs()
        root = weights.new_tensor(bank.scaling).sqrt()
        if active is not None:
            weights, root = weights[..., list(active)], root[list(active)]
        summed = torch.einsum("...e,...er->...r", weights * root, latents.to(weights.dtype))
        return (summed.unsqueeze(-2) / root.unsqueeze(-1)).to(latents.dtype)


COMBINES: dict[str, Combine] = {
    "sum": Combine(),
    "gram_schmidt": GramSchmidt(is_unit=False),
    "gram_schmidt_unit": GramSchmidt(is_unit=True),
    "separate": SeparateSum(),
}
