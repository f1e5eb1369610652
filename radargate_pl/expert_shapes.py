"""Whether the tensors of a layer's experts fit together (layer 1)."""

from collections.abc import Mapping

from torch import Tensor


def check_experts(
    lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor], scaling: Mapping[str, float], library: tuple[str, ...]
) -> None:
    """Refuse experts whose names differ between the arguments, or whose shapes do not fit together.

    Args:
        lora_A: expert name to A, (r_i, in).
        lora_B: expert name to B, (out, r_i).
        scaling: expert name to its factor.
        library: names of all experts of the network.

    Raises:
        ValueError: naming the experts.
    """
    if not lora_A or set(lora_A) != set(lora_B) or set(lora_A) != set(scaling) or not set(lora_A) <= set(library):
        raise ValueError(
            "Expected lora_A, lora_B and scaling to name the same experts, at least one, all of them in the library, "
            f"but got lora_A={sorted(lora_A)}, lora_B={sorted(lora_B)}, scaling={sorted(scaling)}, "
            f"library={sorted(library)}."
        )
    first = next(iter(lora_A))
    width = (lora_A[first].shape[1], lora_B[first].shape[0])
    for name in lora_A:
        shapes = tuple(lora_A[name].shape), tuple(lora_B[name].shape)
        rank = shapes[0][0]
        if rank == 0 or shapes != ((rank, width[0]), (width[1], rank)):
            raise ValueError(
                f"Expected expert '{name}' to have lora_A (r, {width[0]}) and lora_B ({width[1]}, r) like expert "
                f"'{first}', but got {shapes[0]} and {shapes[1]}."
            )
