"""Two users of one machine share a cache: each reads what the other made, and neither removes or blocks it."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radargate_pl.backbones import load_tokenizer
from radargate_pl.data.cache import pack, read_encoded, write_encoded
from radargate_pl.data.library import Task
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record
from radargate_pl.data.tokenised_tasks import TokenisedTasks
from radargate_pl.folders import folder_made_once

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two other users")

FIRST, SECOND = 4001, 4002
KEY, OTHER = "a" * 64, "b" * 64


def as_user(number: int, function: Callable[[], Any], mask: int = 0o022) -> Any:
    """What a function returns to another user; what it raises is raised here."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.umask(mask)
            os.setgroups([])
            os.setgid(number)
            os.setuid(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = (True, function())
        except BaseException as error:
            answer = (False, repr(error))
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        is_right, value = pickle.load(pipe)
    os.waitpid(child, 0)
    assert is_right, value
    return value


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache as on a cluster: a folder that everybody may write into, and nobody remove another's files from."""
    folder = Path(tempfile.mkdtemp(prefix="radargate-users-"))
    folder.chmod(0o1777)
    monkeypatch.setenv("RADARGATE_CACHE", str(folder / "radargate"))
    yield folder / "radargate"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("debug-tiny")


def entry(number: int) -> Any:
    return pack([[number, 2]], [[3]], [0], [False])


def prompt_of(key: str) -> list[int] | None:
    found = read_encoded(key)
    return None if found is None else found.prompt(0)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_one_user_tokenised_another_finds(cache: Path, mask: int) -> None:
    assert as_user(FIRST, lambda: write_encoded(KEY, entry(1)), mask)
    expected = [1, 2] if mask == 0o022 else None  # somebody who hides files has them hidden
    assert as_user(SECOND, lambda: prompt_of(KEY)) == expected
    assert as_user(SECOND, lambda: write_encoded(OTHER, entry(5)))
    assert as_user(FIRST, lambda: prompt_of(OTHER)) == [5, 2]
    assert as_user(FIRST, lambda: prompt_of(KEY)) == [1, 2], "the second left the first's entry alone"


def test_an_entry_of_another_that_cannot_be_read_stays_and_costs_memory_only(cache: Path, tokenizer: Any) -> None:
    encoder = RecordEncoder(tokenizer, max_length=50)
    task = Task("t")
    task.records["train"] = [Record("r", "What?", ("ab",), "f:1")]

    def tokenised() -> list[int]:
        tasks = TokenisedTasks(encoder, BadRecords("raise"))
        tasks.prepare([task])
        return tasks.load(task, "train").prompt(0)

    expected = as_user(FIRST, tokenised)
    file, *others = sorted((cache / "tokens").iterdir())
    for path in (file, *others):
        path.chmod(0o600)
    before = file.read_bytes()
    assert as_user(SECOND, tokenised) == expected
    assert file.read_bytes() == before
    assert file.stat().st_uid == FIRST


def test_a_cache_that_cannot_be_written_costs_memory_only(cache: Path) -> None:
    cache.mkdir(mode=0o755)
    assert as_user(SECOND, lambda: write_encoded(KEY, entry(1))) is False
    assert list(cache.iterdir()) == []


def test_a_folder_that_one_user_made_serves_another(cache: Path) -> None:
    def make() -> str:
        return (folder_made_once(cache / "backbones" / "tiny", lambda new: write(new / "f")) / "f").read_text()

    def write(path: Path) -> None:
        path.write_text(str(os.getuid()))

    assert as_user(FIRST, make) == str(FIRST)
    assert as_user(SECOND, make) == str(FIRST)
    other = cache / "backbones" / "small"
    assert (as_user(SECOND, lambda: folder_made_once(other, lambda new: write(new / "f"))) / "f").read_text() == str(
        SECOND
    )
