"""Native code: its cosines, its threads, and what happens where it cannot be built."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import IN, assert_near, experts_of, layer_of, randomise
from torch import Tensor

from radargate_pl import notices
from radargate_pl.cache_folder import writable_by_others
from radargate_pl.gates import RadarGate
from radargate_pl.native import kept_library, library
from radargate_pl.native.gathered_rows import gathered_dots, gathered_sums
from radargate_pl.native.narrow_product import narrow_product
from radargate_pl.native.turned_sum import turned_sum, turned_sum_gradients

ROOT = Path(__file__).parent.parent
BUILT = library.native_library() is not None

pytestmark = pytest.mark.skipif(not BUILT, reason="there is no C++ compiler here")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a new process with an empty cache, which is returned."""
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache of mine"))
    library._attempt.cache_clear()
    notices.say_once.cache_clear()
    yield tmp_path / "cache of mine"
    library._attempt.cache_clear()
    notices.say_once.cache_clear()


def turns_of(angles: Tensor) -> Tensor:
    """Cosines and sines beside each other, from a mixture of one expert whose v turns by exactly these angles."""
    planes, like = len(angles), {"dtype": angles.dtype}
    v = torch.tensor([1.0, 0.0], **like).repeat(planes)
    P = torch.zeros(2 * planes, 1, **like)
    P[0] = 1
    ones, which = torch.ones(1, 1, **like), torch.zeros(1, 1, dtype=torch.int64)
    mixed = turned_sum(2 * v[None], ones[..., None], ones, which, v[None], P, angles[None], False)
    return mixed.view(planes, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_and_sines_are_those_of_the_angles(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1.0, 30.0, 8000.0, 1e6, 1e30):
        angles = (size * torch.randn(1001, generator=generator, dtype=torch.float64)).to(dtype)
        expected = torch.stack([angles.double().cos(), angles.double().sin()], -1)
        assert (turns_of(angles).double() - expected).abs().max() <= 2.0 * torch.finfo(dtype).eps, size
    assert turns_of(torch.tensor([float("nan"), float("inf"), 0.0], dtype=dtype)).isnan().all(1).tolist()[:2] == [1, 1]
    quarters = torch.arange(-8, 9, dtype=torch.float64).mul(torch.pi / 4).to(dtype)
    expected = torch.stack([quarters.double().cos(), quarters.double().sin()], -1)
    assert (turns_of(quarters).double() - expected).abs().max() <= torch.finfo(dtype).eps


def operands(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(tokens, 13), (tokens, 2, 5), (tokens, 2), (4 * 5, 13), (13, 3), (3, 6)]
    total, latents, weights, B, P, Q = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [total, latents, weights, torch.randint(0, 4, (tokens, 2), generator=generator), B, P, Q]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_threads(count: int, arguments: list[Tensor]) -> list[Tensor]:
    with threads(count):
        mixed = turned_sum(*arguments, True)
        return [mixed, *turned_sum_gradients(torch.cos(mixed), *arguments, True)]


def test_threads_share_the_tokens_and_their_sums_are_added_in_order() -> None:
    for tokens in (1, 2, 37):
        arguments = operands(tokens)
        alone, together, again = (with_threads(count, arguments) for count in (1, 3, 3))
        for one, several, repeated in zip(alone, together, again, strict=True):
            assert torch.equal(several, repeated)
            assert_near(several, one, 1e-5, f"{tuple(one.shape)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_are_those_of_an_index(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(6 * 5, 11, generator=generator).to(dtype)
    indices = torch.randint(0, 6, (7, 3), generator=generator)
    factors, wide = torch.randn(7, 3, 5, generator=generator), torch.randn(7, 11, generator=generator)
    chosen = rows.float().unflatten(0, (6, 5))[indices]
    assert_near(gathered_sums(factors, indices, rows), (factors.unsqueeze(-1) * chosen).sum((1, 2)), 1e-6, "sums")
    assert_near(gathered_dots(wide, indices, rows, 5), (chosen * wide[:, None, None]).sum(-1), 1e-6, "dots")


@pytest.mark.skipif(
    not hasattr(library.native_library(), "narrow_product_bfloat16"),
    reason="this processor, or its compiler, does not multiply pairs of 16-bit numbers",
)
@pytest.mark.parametrize("width", [1, 31, 64, 65, 130])
def test_a_product_of_16_bit_numbers_is_exact_but_for_the_order_of_its_sums(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for tokens, depth in ((1, 2), (5, 40), (6, 2), (37, 64)):
        x, rows = torch.randn(tokens, depth, generator=generator), torch.randn(depth, width, generator=generator)
        x, rows = x.bfloat16(), rows.bfloat16()
        expected = 0.75 * (x.double() @ rows.double())
        for count in (1, 3):
            with threads(count):
                found = narrow_product(x, rows, 0.75)
            assert_near(found.double(), expected, 2e-6, f"{tokens} tokens, {depth} rows")
    assert narrow_product(x[:0], rows, 1.0).shape == (0, width)
    x[3] = float("nan")
    assert narrow_product(x, rows, 1.0).isnan().any(1).nonzero().tolist() == [[3]]
    for wrong in ((x.float(), rows), (x, rows.float()), (x[:, :-2], rows), (x[:, :3], rows[:3])):
        with pytest.raises(RuntimeError, match="Expected"):
            narrow_product(*wrong, 1.0)


def test_gradients_that_are_lazily_negated_are_read() -> None:
    grad, arguments = torch.randn(4, 13), operands(4)
    negated = turned_sum_gradients(torch._neg_view(grad), *arguments, True)
    for found, expected in zip(negated, turned_sum_gradients(-grad, *arguments, True), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("place", range(7))
def test_operands_that_do_not_go_together_are_refused(place: int) -> None:
    """C++ would read and write beyond them."""
    arguments = operands(4)
    wide, short = list(arguments), list(arguments)
    wide[place] = arguments[place].double() if place != 3 else arguments[place].int()
    short[place] = arguments[place][:, :1] if place == 1 else arguments[place][..., :-1]
    for wrong in (wide, short):
        with pytest.raises(RuntimeError, match="Expected"):
            turned_sum(*wrong, True)
        with pytest.raises(RuntimeError, match="Expected"):
            turned_sum_gradients(torch.randn(4, 13), *wrong, True)


def test_experts_that_are_none_are_refused() -> None:
    arguments = operands(4)
    for wrong in (-1, 4):
        arguments[3][2, 1] = wrong
        with pytest.raises(IndexError, match="indices from 0 to 3"):
            turned_sum(*arguments, True)


def test_a_gate_in_another_precision_than_its_experts_is_refused_as_in_plain_operations() -> None:
    from radargate_pl.gates import RotationGate

    layer = layer_of(experts_of(4), RotationGate)
    for mixture in ("auto", "torch"):
        layer.mixture = mixture
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(3, IN, dtype=torch.float64))


def test_numbers_that_are_none_stay_none() -> None:
    arguments = operands(4)
    arguments[1][2] = float("nan")
    mixed = turned_sum(*arguments, True)
    assert mixed.isnan().any(1).tolist() == [False, False, True, False]


def mixture_is_right() -> None:
    layer = layer_of(experts_of(5, dtype=torch.float32), RadarGate)
    randomise(layer.gate)
    x = torch.randn(3, IN)
    found = layer(x.requires_grad_())
    layer.mixture = "plain"
    assert_near(found, layer(x), 1e-5, "mixture")


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


COMPILERS = {
    "missing": ("no-such-compiler --fast", "there is no compiler no-such-compiler"),
    "failing": ("printf 'x.cpp:1: error: \\377 too old\\n' >&2; exit 1", "error: \ufffd too old"),
    "silent": ("exit 3", "without a word"),
    "idle": ("exit 0", "ended well and made nothing"),
    "endless": ("echo thinking >&2; exec sleep 20", "did not end within 1 seconds"),
    "quoted": ("g++ 'x", "No closing quotation"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_without_a_compiler_one_warning_says_so_and_the_results_are_the_same(
    kind: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, cause = COMPILERS[kind]
    monkeypatch.setenv("CXX", compiler if kind in ("missing", "quoted") else script(tmp_path, compiler))
    monkeypatch.setattr(library, "SECONDS", 1)
    with caplog.at_level(logging.WARNING):
        mixture_is_right()
        mixture_is_right()
        library.native_library()
    (warning,) = [record.message for record in caplog.records]
    assert cause in warning
    assert "CXX" in warning
    assert "execution.mixture: torch" in warning
    assert not fresh.exists()


def test_one_process_of_a_machine_speaks(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert library.native_library() is None
    assert not caplog.records


def test_a_compiler_may_have_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -g0")
    assert library.native_library() is not None


def test_a_compiler_older_than_the_processor_builds_what_it_can(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    refusing = 'case "$*" in *avx512bf16*) echo "error: unrecognized option" >&2; exit 1;; esac; exec g++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path, refusing))
    found = library.native_library()
    assert found is not None
    assert not hasattr(found, "narrow_product_bfloat16")
    mixture_is_right()
    monkeypatch.delenv("CXX")  # a newer one, and what the old one made is still in the cache
    library._attempt.cache_clear()
    assert hasattr(library.native_library(), "narrow_product_bfloat16") == (library.NARROW in library._flags())


def test_it_is_built_once_for_all_processes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.native_library() is not None
    (made,) = (fresh / "native").iterdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._attempt.cache_clear()
    assert library.native_library() is not None
    assert [made] == list((fresh / "native").iterdir())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_part_of_a_file_is_built_anew(share: float, fresh: Path) -> None:
    """A system's loader takes half a library without a word, and the process dies at the first page that is missing."""
    place = library._place(library._flags())
    place.parent.mkdir(parents=True)
    content = b"\x7fELF" + bytes(100_000)
    whole = content + hashlib.sha256(content).digest()
    place.write_bytes(whole[: int(share * len(whole))])
    assert kept_library.load(place) is None
    assert library.native_library() is not None
    assert kept_library.load(place) is not None


def test_a_file_of_somebody_else_is_not_run(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.native_library() is not None
    place = library._place(library._flags())
    assert kept_library.load(place) is not None
    monkeypatch.setattr(kept_library, "writable_by_others", lambda _: None)
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_uid=23456, st_mode=0o100644))
    assert kept_library.load(place) is None
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_uid=os.getuid(), st_mode=0o100664))
    assert kept_library.load(place) is None
    monkeypatch.undo()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(Path, "lstat", lambda _: SimpleNamespace(st_uid=23456, st_mode=0o100644))
    assert kept_library.load(place) is None


@pytest.fixture
def group_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that others can enter, in which the umask of a group's projects holds."""
    folder = Path(tempfile.mkdtemp(prefix="radargate-group-"))
    folder.chmod(0o755)
    monkeypatch.setenv("RADARGATE_CACHE", str(folder / "cache"))
    notices.say_once.cache_clear()
    before = os.umask(0o002)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def test_what_others_may_write_is_not_run(
    group_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A member of the group may write into the file, or put another into its place."""
    content = b"no library"
    loaded: list[str] = []
    monkeypatch.setattr(kept_library.ctypes, "CDLL", lambda name: loaded.append(name) or name)
    cache = group_folder / "cache"
    cache.mkdir(mode=0o755)
    cache.chmod(0o755)
    place = kept_library.library_folder() / "x.so"
    kept_library.keep(place, content)
    assert stat.S_IMODE(place.stat().st_mode) == 0o644
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o755
    assert kept_library.load(place) is not None
    place.chmod(0o664)
    assert kept_library.load(place) is None
    kept_library.keep(place, content)
    assert kept_library.load(place) is not None
    place.parent.chmod(0o775)
    assert kept_library.load(place) is None
    assert kept_library.library_folder() == place.parent
    assert kept_library.load(place) is not None, "closed again, being this user's own"
    place.parent.chmod(0o1777)  # a common folder: nobody removes another's file
    assert kept_library.load(place) is not None
    assert not caplog.records
    cache.chmod(0o775)
    assert kept_library.load(place) is None
    (group_folder / "tmp").mkdir()
    (group_folder / "tmp").chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(group_folder / "tmp"))
    own = kept_library.library_folder()
    assert own.parent.name == "tmp"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert f"chmod go-w {cache}" in caplog.text
    kept_library.keep(own / "x.so", content)
    assert kept_library.load(own / "x.so") is not None
    assert all(name.startswith("/proc/self/fd/") for name in loaded)
    assert len(set(loaded)) == len(loaded), "a loader takes an equal name for a library it has"


def test_what_lies_below_a_closed_folder_is_out_of_reach(group_folder: Path) -> None:
    place = group_folder / "closed" / "open" / "file"
    place.parent.mkdir(parents=True)
    place.touch(mode=0o644)
    place.parent.chmod(0o777)
    place.parent.parent.chmod(0o755)
    assert writable_by_others(place) == place.parent
    (group_folder / "link").symlink_to(place)
    assert writable_by_others(group_folder / "link") == place.parent
    place.parent.parent.chmod(0o700)
    assert writable_by_others(place) is None
    place.parent.chmod(0o1777)
    place.parent.parent.chmod(0o755)
    assert writable_by_others(place) is None


def test_a_cache_that_cannot_be_written_costs_a_build_and_no_more(fresh: Path) -> None:
    fresh.write_text("a file where the folder should be")
    assert library.native_library() is not None
    mixture_is_right()
    assert fresh.read_text() == "a file where the folder should be"


def test_processes_that_build_at_once_do_not_disturb_each_other(fresh: Path) -> None:
    code = "from radargate_pl.native.library import native_library as n; assert n() is not None; print(n())"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert all("CDLL" in line for line in said)
    assert len(list((fresh / "native").iterdir())) == 1
