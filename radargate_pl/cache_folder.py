"""Where this package keeps what it fetched or made (standard library only)."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `RADARGATE_CACHE`, else `~/.cache/radargate`."""
    return Path(os.environ.get("RADARGATE_CACHE") or "~/.cache/radargate").expanduser()
