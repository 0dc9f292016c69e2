"""Plan files on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(:(?P<file>[\w./-]+\.json))?")

DEFAULT_FILE = "plan.json"


def is_hub_id(text: str) -> bool:
    """Whether `text` is OWNER/NAME or OWNER/NAME:FILE.json, and not the name of a file or folder that exists."""
    found = _HUB_ID.fullmatch(text)
    return found is not None and (found["file"] is not None or not text.endswith(".json")) and not Path(text).exists()


def fetch(hub_id: str) -> Path:
    """The file of a hub id in the local cache, downloaded if need be; plan.json where the id names none.

    Raises:
        ValueError: if it cannot be fetched, naming the id.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    found = _HUB_ID.fullmatch(hub_id)
    assert found is not None
    file = found["file"] or DEFAULT_FILE
    try:
        return Path(hf_hub_download(found["repository"], file))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot fetch {file} of {found['repository']} from the Hub: {reason}") from error
