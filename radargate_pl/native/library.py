"""From C++ to functions that can be called: compiled once for a kind of processor, kept in the cache folder (layer 1).

A plain library without torch's headers takes seconds to build, not half a minute, and holds for every version of torch.
It is built beside its place and renamed: processes that start together, or are killed, leave no lock and no half file.
Nothing is linked: threads come from the OpenMP library that torch has loaded, since two of them would fight.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from radargate_pl.native.kept_library import keep, library_folder, load
from radargate_pl.notices import say_once

FOLDER = Path(__file__).parent
# No -ffast-math: NaN and infinity mean what they say. No -march=native: the machines of a cluster share a cache.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512")
OF_PROCESSOR = {"AVX2": AVX2, "AVX512": AVX512}
NARROW = "-mavx512bf16"  # products of 16-bit numbers; g++ before 10 does not know it
_LOCK = threading.Lock()
SECONDS = 120  # for building: fifty times what it takes on a quiet machine


class Attempt(NamedTuple):
    """What became of loading the library: the library, or why there is none and what to do."""

    library: ctypes.CDLL | None
    cause: str = ""


def native_library() -> ctypes.CDLL | None:
    """Return the library; ``None``, after one warning on each machine, where it cannot be built or loaded."""
    library, cause = attempt()
    if library is None and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        say_once(
            f"The mixture runs without its native code, more slowly and to the same results: {cause}. Or set "
            "model.network.init_args.execution.mixture: torch to not try."
        )
    return library


@functools.cache
def _attempt() -> Attempt:
    advice = "install a C++ compiler (g++), or name one in CXX"
    try:
        return Attempt(_loaded(_flags()))
    except subprocess.TimeoutExpired as error:
        return Attempt(None, f"{error.cmd[0]} did not end within {SECONDS} seconds; name another compiler in CXX")
    except subprocess.CalledProcessError as error:
        return Attempt(
            None, f"{error.cmd[0]} failed ({_cause(error.stderr)}); {advice} that knows {' '.join(_flags())}"
        )
    except FileNotFoundError as error:
        return Attempt(None, f"{error}; {advice}")
    except (OSError, ValueError, RuntimeError) as error:
        return Attempt(
            None, f"{error}; see that TMPDIR and RADARGATE_CACHE can be written and run from, and CXX is right"
        )


def attempt() -> Attempt:
    """Load the library, built first if need be, once for each process."""
    with _LOCK:
        return _attempt()


def _place(flags: tuple[str, ...]) -> Path:
    sources = [path.read_text(encoding="utf-8") for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")))]
    key = "\n".join([*sources, platform.machine(), *flags])
    return library_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _flags() -> tuple[str, ...]:
    of_processor = OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ())
    is_narrow = of_processor == AVX512 and torch.cpu._is_avx512_bf16_supported()
    return (*FLAGS, *of_processor, *([NARROW] if is_narrow else []))


def _loaded(flags: tuple[str, ...]) -> ctypes.CDLL:
    place = _place(flags)
    try:
        library = load(place)
        if library is not None:
            return library
    except OSError:  # of a machine with another C library
        pass
    try:
        return _made(place, flags)
    except subprocess.CalledProcessError:
        if NARROW not in flags:
            raise
        return _loaded(tuple(flag for flag in flags if flag != NARROW))


def _made(place: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="radargate-native-") as folder:
        built = _built(Path(folder), flags)
        # Loaded before it is kept: what does not load is not left for others.
        library = ctypes.CDLL(str(built))
        keep(place, built.read_bytes())
        return library


def _built(folder: Path, flags: tuple[str, ...]) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    found = shutil.which(compiler[0])
    if found is None:
        raise FileNotFoundError(f"there is no compiler {compiler[0]}")
    compiler[0] = os.path.abspath(found)  # it runs elsewhere
    sources, built = sorted(map(str, FOLDER.glob("*.cpp"))), folder / "native.so"
    _run([*compiler, *flags, "-c", *sources], folder)
    _run([*compiler, "-shared", *sorted(map(str, folder.glob("*.o"))), "-o", str(built)], folder)
    if not built.exists():
        raise OSError(f"{compiler[0]} ended well and made nothing")
    return built


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=SECONDS)


def _cause(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a word")
