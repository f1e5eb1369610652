"""Runs a function in several processes that talk over gloo."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixture_switch  # noqa: F401
import torch
import torch.multiprocessing


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `function(rank, world_size, *arguments)` in every process; return what each returned.

    Args:
        function: at the top level of a module; what it returns must be tensors, numbers and the like.
        world_size: number of processes.
        arguments: for all alike.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _run, (function, world_size, port, folder, list(sys.path), *arguments), nprocs=world_size, join=True
        )
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, function: Callable[..., Any], world_size: int, port: int, folder: str, path: list[str], *arguments: Any
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    # What torchrun sets: Lightning then takes these processes as they are.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    try:
        torch.save(function(rank, world_size, *arguments), Path(folder) / str(rank))
    except BaseException:
        traceback.print_exc()
        raise
