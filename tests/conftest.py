"""What every test lives in: no network, a cache of its own, one thread, and no state left over from the test before."""

import atexit
import os
import shutil
import tempfile

# Both before torch, transformers and datasets are imported, which read them once. The folder is removed at exit.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
CACHE = tempfile.mkdtemp(prefix="radargate-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["HF_HOME"] = f"{CACHE}/huggingface"
os.environ["RADARGATE_CACHE"] = f"{CACHE}/radargate"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import socket
import sys
from collections.abc import Iterator

import input_scale
import mixture_switch
import pytest
import torch

from radargate_pl import shared_inputs

input_scale.apply_scale()

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")


@pytest.fixture(scope="session", autouse=True)
def closed_sockets() -> Iterator[None]:
    """Only this machine can be reached; anything else is refused as if there were no network."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL:
            raise OSError(f"the tests run without a network, but something connects to {address}")
        return connect(self, address)

    def local_resolve(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name not in (*LOCAL, socket.gethostname()):
            raise socket.gaierror(socket.EAI_NONAME, f"the tests run without a network, but something looks up {name}")
        return resolve(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = local_connect, local_resolve
    yield
    socket.socket.connect, socket.getaddrinfo = connect, resolve


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undoes what Lightning sets for a whole process: seeds in the environment, deterministic algorithms."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG", "RADARGATE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["radargate"])
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:  # made at import, with the stderr of whichever test was first
            handler.stream = sys.__stderr__  # setStream() would flush the closed one
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def quick_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick path of decoding, also where the run is on plain operations."""
    monkeypatch.setattr(shared_inputs, "_is_decoding", mixture_switch.is_decoding)
