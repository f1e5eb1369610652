"""What somebody may have meant who named a task that is not there."""

import difflib
from collections.abc import Mapping, Sequence

from radargate_pl.benchmarks.declaration import Benchmark


def nearest_names(name: str, benchmarks: Mapping[str, Benchmark], others: Sequence[str] = ()) -> list[str]:
    """Known names that are spelled alike, or whose name in the paper is; up to three, the nearest first.

    Args:
        name: what was typed.
        benchmarks: the tasks by name.
        others: further names: of groups, or of files.

    Example:
        >>> from radargate_pl.benchmarks import BENCHMARKS
        >>> nearest_names("OBQA", BENCHMARKS)
        ['openbookqa']
    """
    spelled: dict[str, list[str]] = {}
    for known in (*benchmarks, *others):
        for spelling in {known, benchmarks[known].paper_name if known in benchmarks else known}:
            spelled.setdefault(_plain(spelling), []).append(known)
    asked = _plain(name)
    near = [asked] if asked in spelled else difflib.get_close_matches(asked, spelled, n=3, cutoff=0.4)
    return list(dict.fromkeys(known for spelling in near for known in spelled[spelling]))[:3]


def _plain(spelling: str) -> str:
    return spelling.lower().replace("-", "_")
