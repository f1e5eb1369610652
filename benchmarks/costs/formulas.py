"""Cost formulas of one mixture layer: products and numbers per token, for RadarGate with scores from the input.

One multiply-add is two operations. ``n`` experts of rank ``r``, ``k`` kept, angle rank ``a``, a layer ``d_in`` to
``d_out``. "Products" are matrix products alone, which is what a counter of products sees; the rest (norms, rotations,
weighted sums) grows with ``k d_out`` in this package and with ``n d_out`` in the dense form.
"""

from typing import NamedTuple


class Size(NamedTuple):
    """Sizes of a layer and its mixture."""

    n: int
    k: int
    r: int
    a: int
    d_in: int
    d_out: int


def minimal_forward(size: Size, scorer: str = "x") -> int:
    """Operations of the factored form, everything counted: latents, scores, total, kept outputs, angles, rotation, sum.

    Args:
        size: of the layer.
        scorer: "x", or "experts" (LayerNorm of all outputs side by side, from the latents).

    Example:
        >>> [round(minimal_forward(Size(n, 2, 8, 8, 576, 576), "experts") / 1e6, 3) for n in (5, 40)]
        [0.148, 0.823]
    """
    n, k, r, a, d_in, d_out = size
    scores = 2 * n * d_in if scorer == "x" else 2 * n**2 * r + n * (2 * r**2 + 2 * r) + 2 * n * r
    kept = 2 * k * r * d_out + k * (2 * d_out + 3 * a * d_out) + 3 * k * d_out + 2 * k * d_out
    return 2 * n * r * d_in + scores + 2 * n * r * d_out + kept


def naive_forward(size: Size, scorer: str = "x") -> int:
    """Operations of the dense form: every expert's output is made and rotated for every token.

    Args:
        size: of the layer.
        scorer: "x" or "experts".

    Example:
        >>> [round(naive_forward(Size(n, 2, 8, 8, 576, 576), "experts") / 1e6, 3) for n in (5, 40)]
        [0.233, 3.479]
    """
    n, _, r, a, d_in, d_out = size
    scores = 2 * n * d_in if scorer == "x" else 7 * n * d_out + 2 * n**2 * d_out
    rotated = n * (2 * d_out + 3 * a * d_out) + 3 * n * d_out + 2 * n * d_out
    return 2 * n * r * (d_in + d_out) + scores + n * d_out + rotated


def plain_products(size: Size) -> int:
    """Products of forward and backward as the plain path does them, with a gradient for the layer's input.

    A kept expert is lifted from latents masked to it, a product over all n experts, and once more in the backward pass,
    which recomputes it; where all experts are kept each is lifted alone.
    """
    n, k, r, a, d_in, d_out = size
    lift = 2 * r * d_out * (n if k < n else 1)
    angles = 3 * a * d_out
    latents, scores, total = 2 * n * r * d_in, 2 * n * d_in, 2 * n * r * d_out
    forward = latents + scores + total + k * (lift + angles)
    backward = latents + 2 * scores + total + k * (lift + angles) + k * (lift + 2 * angles)
    return forward + backward


def naive_products(size: Size) -> int:
    """Products of forward and backward of the dense form, with a gradient for the layer's input."""
    n, _, r, a, d_in, d_out = size
    outputs, scores, angles = 2 * n * r * (d_in + d_out), 2 * n * d_in, 3 * n * a * d_out
    return 2 * outputs + 3 * scores + 3 * angles


def minimal_products(size: Size) -> int:
    """Products of forward and backward if a kept expert were lifted by its own r x d_out factor alone."""
    n, k, r, a, d_in, d_out = size
    lift, angles = 2 * k * r * d_out, 3 * k * a * d_out
    return 2 * (2 * n * r * (d_in + d_out)) + 3 * 2 * n * d_in + 2 * lift + 3 * angles


def paper_forward(size: Size) -> int:
    """Operations the paper counts for a forward: scores and sum over n, and the LoRA work of the kept experts alone.

    RECONSTRUCTED from a summary of arXiv 2505.23184, C.4 (eq. 40: k experts' LoRA work, P and Q once, linear in n),
    with the coefficients that give the two quotients stated there (a forward needs at least 2.1 and 5.3 times as much
    at d = 4096, k = 2, r = a = 8 and n = 5, 40); not read from the paper. It leaves out the latents and the total of
    all n experts, which its own eq. 4 and 5 need.

    Example:
        >>> sizes = [Size(n, 2, 8, 8, 4096, 4096) for n in (5, 40)]
        >>> [round(minimal_forward(size, "experts") / paper_forward(size), 1) for size in sizes]
        [2.1, 5.3]
    """
    n, k, r, a, d_in, d_out = size
    return 2 * (n * d_in + n * d_out + k * r * (d_in + d_out) + 2 * a * d_out + k * d_out)


def trained_numbers(size: Size) -> int:
    """Parameters that train: the scorer, P and Q (shared by all experts).

    Example:
        >>> trained_numbers(Size(40, 2, 8, 8, 576, 576))
        29952
    """
    n, _, _, a, d_in, d_out = size
    return n * d_in + a * d_out + a * (d_out // 2)


def paper_numbers(size: Size) -> int:
    """Parameters the paper counts (C.4): a row of the scorer and two angle factors for every expert, n (2 a + 1) d."""
    return size.n * (size.d_in + 2 * size.a * size.d_out)


def frozen_numbers(size: Size) -> int:
    """Parameters of the experts."""
    return size.n * size.r * (size.d_in + size.d_out)


def kept_numbers(size: Size) -> int:
    """Numbers per token that the backward pass cannot do without: latents, k weights and k indices."""
    return size.n * size.r + 2 * size.k


def naive_kept_numbers(size: Size) -> float:
    """Numbers per token of the dense form's forward: outputs, products, angles, rotated outputs."""
    return 4.5 * size.n * size.d_out + size.d_out
