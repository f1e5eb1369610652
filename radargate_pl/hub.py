"""What there is to say when the Hugging Face hub does not answer."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name`, or `name` as the oldest models have it."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def hub_cache_folder(hub_id: str) -> Path:
    """The folder of the hub's own cache that holds a model or an adapter; it can be copied between machines."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"


def hub_error(what: str, hub_id: str, error: Exception, hint: str = "") -> ValueError:
    """The error for something that is neither on this machine nor fetched from the hub.

    Args:
        what: what was wanted, e.g. `"backbone"`.
        hub_id: its id.
        error: what the hub's client said.
        hint: a sentence more.
    """
    folder = hub_cache_folder(hub_id)
    said = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"Expected {what} {hub_id!r} to be a local folder, in the hub's cache or on the hub, but it could not be "
        f"fetched: {said[0]}{hint}\n"
        f"If the name is right: where there is a network run: hf download {hub_id}\n"
        f"and copy the folder {folder.name} from the hub's cache there (by default ~/.cache/huggingface/hub) into "
        f"the folder {folder.parent} of this machine, then repeat the command."
    )
