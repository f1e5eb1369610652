"""Fingerprints: which weights a run used, whatever folder they lay in and whatever dtype they were cast to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes read at a time: a fingerprint of any size needs 4 MiB
MAX_HEADER = 100_000_000  # the limit of the safetensors format itself


def fingerprint_tensors(files: Sequence[Path], extra: dict[str, Any] | None = None) -> str:
    """SHA-256 over the sorted (name, shape, dtype, SHA-256 of the bytes) of all tensors in these files.

    Neither paths, nor the order of the tensors, nor how they are divided over shards, nor the metadata enter. A `.gguf`
    file counts as one tensor of all its bytes: what its metadata says (rotary base, vocabulary) changes the model too.

    Args:
        files: safetensors files, or one `.gguf` file.
        extra: values beside the tensors that change what they compute, e.g. an adapter's alpha; must be JSON.

    Returns:
        `"sha256:"` and 64 hexadecimal digits.

    Raises:
        ValueError: a file is missing or is not what its name says.
    """
    entries = sorted(entry for file in files for entry in _entries(Path(file)))
    if not entries:
        raise ValueError("Expected files to hold at least one tensor to fingerprint, but got none.")
    text = json.dumps([entries, extra or {}], sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def fingerprint_state(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors in memory: SHA-256 over the sorted (name, shape, dtype, SHA-256 of the bytes).

    Args:
        tensors: name to tensor of any shape, dtype and device.
    """
    import torch

    entries = []
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries.append([name, list(tensor.shape), str(tensor.dtype), hashlib.sha256(data).hexdigest()])
    return f"sha256:{hashlib.sha256(json.dumps(entries).encode()).hexdigest()}"


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in small pieces."""
    with file.open("rb") as stream:
        return _sha256(stream, file.stat().st_size, file)


def check_fingerprint(what: str, expected: str, found: str) -> None:
    """Refuse weights other than the expected ones.

    Args:
        what: what is compared, for the message, e.g. `"backbone smollm2-135m-q4"`.
        expected: the fingerprint that was stored.
        found: the fingerprint of what is loaded now.

    Raises:
        ValueError: they differ; the message shows both.
    """
    if expected != found:
        raise ValueError(
            f"Expected {what} to be the one used before, but its weights differ: expected {expected}, found {found}. "
            "Give the files it was made with (any folder, any dtype), or start anew with these."
        )


def _entries(file: Path) -> list[list[Any]]:
    if not file.is_file():
        raise ValueError(f"Expected a weights file at {file}, but there is none.")
    if file.suffix == ".gguf":
        return [["", [file.stat().st_size], "gguf", sha256_of_file(file)]]
    return _safetensors_entries(file)


def _safetensors_entries(file: Path) -> list[list[Any]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"Expected {file} to be a safetensors file, but its header is damaged. Fetch or save it again."
            )
        try:
            header = json.loads(stream.read(length))
            tensors = [(k, v["shape"], v["dtype"], v["data_offsets"]) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected {file} to be a safetensors file, but its header is damaged ({error}). "
                "Fetch or save it again."
            ) from error
        entries = []
        for name, shape, dtype, (start, end) in tensors:
            stream.seek(8 + length + start)
            entries.append([name, shape, dtype, _sha256(stream, end - start, file)])
    return entries


def _sha256(stream: BinaryIO, size: int, file: Path) -> str:
    digest = hashlib.sha256()
    while size > 0:
        chunk = stream.read(min(CHUNK, size))
        if not chunk:
            raise ValueError(f"Expected {file} to be complete, but it ends early. Fetch or save it again.")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()
