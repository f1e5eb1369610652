"""From adapters to banks: the files are let go one after the other, and what was shared stays shared."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from radargate_pl.adapters import Adapter
from radargate_pl.expert_banks import loaded_banks

PATHS = ("a.q", "a.v", "b.q")


class Watched(dict):
    """Tells its owner whenever its tensors are gone through."""

    def __init__(self, items, seen) -> None:
        super().__init__(items)
        self.seen = seen

    def items(self):
        self.seen()
        return super().items()


def adapter(name: str, seed: int, paths: tuple[str, ...] = PATHS, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    lora_A = {path: torch.randn(rank, 6, generator=generator) for path in paths}
    lora_B = {path: torch.randn(5, rank, generator=generator) for path in paths}
    return Adapter(name, Path(name), "", dict.fromkeys(paths, 0.5), lora_A, lora_B, False)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banks_hold_the_weights_of_the_files(dtype, trainable):
    made = [adapter("x", 0), adapter("y", 1, PATHS[:2], rank=3), adapter("z", 2, PATHS[1:])]
    expected = {(a.name, p): (a.lora_A[p].to(dtype), a.lora_B[p].to(dtype)) for a in made for p in a.lora_A}
    banks = loaded_banks(made, dtype, trainable=trainable)
    assert list(banks) == list(PATHS)
    for (name, path), (lora_A, lora_B) in expected.items():
        found = banks[path].expert_weights(name)
        assert torch.equal(found[0].to(dtype), lora_A)
        assert torch.equal(found[1].to(dtype), lora_B)
    assert sum(len(bank.names) for bank in banks.values()) == len(expected)
    assert all(not (a.lora_A or a.lora_B) for a in made)
    for parameter in (p for bank in banks.values() for p in bank.parameters()):  # no view of something larger
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_a_file_is_let_go_before_the_next_one_is_read():
    first, second = adapter("x", 0), adapter("y", 1)
    references = [weakref.ref(tensor) for side in (first.lora_A, first.lora_B) for tensor in side.values()]
    alive: list[int] = []
    second.lora_A = Watched(second.lora_A, lambda: alive.append(sum(ref() is not None for ref in references)))
    loaded_banks([first, second], torch.float32)
    assert alive[0] == 2 * len(PATHS)
    assert alive[-1] <= 1  # the loop's own variable


def test_experts_that_share_their_A_go_on_sharing_it():
    first, second = adapter("x", 0), adapter("y", 1)
    second.lora_A = dict(first.lora_A)
    expected: dict[str, Tensor] = {path: tensor.clone() for path, tensor in first.lora_A.items()}
    for path, bank in loaded_banks([first, second], torch.float32).items():
        assert bank.shares_A
        assert bank.lora_A.shape[0] == 1
        assert torch.equal(bank.lora_A[0], expected[path])
