"""Whether all processes hold the same tensors (layer 5)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from radargate_pl.processes import gathered


def checksum(tensor: Tensor) -> int:
    """A number that changes with (almost) every change of a tensor's bytes; read in place, on its device.

    The bytes are added up as integers, plainly and weighted by their place modulo 251: a flipped bit is always seen, an
    exchange of values unless they lie a multiple of 251 bytes apart.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = 0
    for number, piece in enumerate(data.split(1 << 24)):  # 16 MiB: int64 copies of a whole matrix would not fit
        wide = piece.to(torch.int64)
        places = torch.arange(len(wide), device=wide.device) % 251 + 1
        total += (int(wide.sum()) + (int((wide * places).sum()) << 8)) * (2 * number + 1)
    return total % 2**62


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The checksum of each tensor, shape and dtype included, by name."""
    found = {}
    for name, tensor in tensors.items():
        kind = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode()).digest()
        found[name] = (checksum(tensor) + int.from_bytes(kind[:7], "big")) % 2**62
    return found


def differing(tensors: Mapping[str, Tensor], world_size: int) -> list[str]:
    """Compare tensors over all processes; every one of them must call this.

    Args:
        tensors: by name.
        world_size: number of processes.

    Returns:
        Names of tensors that are not the same everywhere, or not everywhere; the same list on every process.
    """
    if world_size == 1:
        return []
    everywhere = gathered(digests(tensors), world_size)
    names = dict.fromkeys(name for found in everywhere for name in found)
    return [name for name in names if len({found.get(name) for found in everywhere}) > 1]


def check_replicas(tensors: Mapping[str, Tensor], world_size: int, what: str, remedy: str) -> None:
    """Refuse to go on when processes hold different tensors.

    Args:
        tensors: by name.
        world_size: number of processes.
        what: they are, for the message.
        remedy: what to do.

    Raises:
        ValueError: on every process, naming the first tensors that differ.
    """
    names = differing(tensors, world_size)
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(
            f"Expected all {world_size} processes to hold the same {what}, but {', '.join(names[:4])}{more} differ. "
            f"{remedy}"
        )
