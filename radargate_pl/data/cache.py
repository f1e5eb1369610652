"""Tokenised records on disk, found again by content: nothing is pickled, a write is whole or absent."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from radargate_pl.cache_folder import cache_folder, make_shared_folder, umask
from radargate_pl.data.records import Record

FORMAT_VERSION = 1
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)  # another user's folder, or a disk that is read only


@dataclass(frozen=True)
class Encoded:
    """Token ids of many records, laid end to end.

    Args:
        prompts: (sum of prompt lengths,) int32 token ids.
        prompt_ends: (examples,) int64, where each prompt ends in `prompts`.
        answers: (sum of answer lengths,) int32 token ids, end tokens included.
        answer_ends: (examples,) int64, where each answer ends in `answers`.
        kept: (examples,) int64, which record each example was made of.
        truncated: (examples,) bool, whether the source lost its middle.
    """

    prompts: NDArray[np.int32]
    prompt_ends: NDArray[np.int64]
    answers: NDArray[np.int32]
    answer_ends: NDArray[np.int64]
    kept: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.kept)

    def prompt(self, index: int) -> list[int]:
        """Token ids of the prompt of example `index`."""
        return _piece(self.prompts, self.prompt_ends, index)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer of every example, (examples,)."""
        return np.diff(self.prompt_ends, prepend=0) + np.diff(self.answer_ends, prepend=0)

    def answer(self, index: int) -> list[int]:
        """Token ids of the answer of example `index`, end token included."""
        return _piece(self.answers, self.answer_ends, index)


def pack(prompts: Sequence[list[int]], answers: Sequence[list[int]], kept: list[int], truncated: list[bool]) -> Encoded:
    """Lay lists of token ids end to end."""
    return Encoded(
        prompts=np.fromiter((token for ids in prompts for token in ids), np.int32),
        prompt_ends=np.cumsum([len(ids) for ids in prompts], dtype=np.int64),
        answers=np.fromiter((token for ids in answers for token in ids), np.int32),
        answer_ends=np.cumsum([len(ids) for ids in answers], dtype=np.int64),
        kept=np.array(kept, np.int64),
        truncated=np.array(truncated, np.bool_),
    )


def joined(pieces: Sequence[Encoded]) -> Encoded:
    """Token ids of several pieces of one list of records, one after the other; `kept` counts in the whole list."""
    if not pieces:
        return pack([], [], [], [])
    together = {field.name: [getattr(piece, field.name) for piece in pieces] for field in fields(Encoded)}
    for ends, tokens in (("prompt_ends", "prompts"), ("answer_ends", "answers")):
        before = np.cumsum([0, *(len(piece) for piece in together[tokens][:-1])])
        together[ends] = [piece + start for piece, start in zip(together[ends], before, strict=True)]
    return Encoded(**{name: np.concatenate(parts) for name, parts in together.items()})


def content_key(records: Sequence[Record], encoder_key: str) -> str:
    """SHA-256 of everything that token ids depend on: the texts, and the encoder's own key.

    Ids, file names and places are left out, so renamed or moved files still hit.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION}\n{encoder_key}\n".encode())
    for record in records:
        digest.update(json.dumps([record.source, record.targets[0], record.rationale]).encode() + b"\n")
    return digest.hexdigest()


def read_encoded(key: str) -> Encoded | None:
    """The entry of `key`, or None when there is none.

    A damaged entry counts as none and is written anew. One that cannot be read is another user's: it counts as none,
    and stays.
    """
    path = _path(key)
    try:
        if not path.is_file():
            return None
        arrays = load_file(path)
        return Encoded(**{field.name: arrays[field.name] for field in fields(Encoded)})
    except OSError:
        return None
    except (SafetensorError, KeyError):
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None


def write_encoded(key: str, encoded: Encoded) -> bool:
    """Write the entry of `key`: first beside it, then renamed, so that readers see a whole file or none.

    Returns:
        Whether it could be written; if not, one warning says so for all entries.
    """
    path = _path(key)
    try:
        _write_beside_and_rename(path, encoded)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        _say_not_writable(str(path.parent), error.strerror or str(error))
        return False
    return True


def _write_beside_and_rename(path: Path, encoded: Encoded) -> None:
    make_shared_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-", suffix=".tmp")
    os.close(handle)
    try:
        save_file({field.name: getattr(encoded, field.name) for field in fields(Encoded)}, name)
        Path(name).chmod(0o666 & ~umask())  # mkstemp makes files that only this user can read
        Path(name).replace(path)  # refused where another user's file lies in a folder with the sticky bit
    finally:
        Path(name).unlink(missing_ok=True)


@lru_cache
def _say_not_writable(folder: str, problem: str) -> None:
    rank_zero_warn(
        f"Token ids could not be written into {folder} ({problem}) and are kept in memory: every process and every run "
        "tokenises anew. RADARGATE_CACHE names another folder."
    )


def _path(key: str) -> Path:
    return cache_folder() / "tokens" / f"{key}.safetensors"


def _piece(tokens: NDArray[np.int32], ends: NDArray[np.int64], index: int) -> list[int]:
    start = int(ends[index - 1]) if index else 0
    return [int(token) for token in tokens[start : int(ends[index])]]
