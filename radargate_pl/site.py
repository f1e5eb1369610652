"""Where a gate sits: all it may know about its layer before weights exist (layer 1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """All a gate or rotation may know about its layer before weights exist.

    Attributes:
        path: module path of the layer inside the backbone.
        in_features: width of the layer's input.
        out_features: width of its output.
        rank: largest rank of the experts there.
        experts: names of the experts present there, in library order.
        stream: whose tokens the layer's input holds, "decoder" or "encoder".
    """

    path: str
    in_features: int
    out_features: int
    rank: int
    experts: tuple[str, ...]
    stream: str = "decoder"
