"""The models that ship with the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEFAULT_MODEL = "emoji"


def shipped_models() -> dict[str, Path]:
    """Folders of the models in the package by name, found without importing the package."""
    spec = importlib.util.find_spec("attngen")
    assert spec is not None and spec.submodule_search_locations is not None
    assets = Path(next(iter(spec.submodule_search_locations))) / "assets"
    folders = {name: assets / name.replace("-", "_") for name in ("emoji", "emoji-128", "emoji-unet")}
    return {name: folder for name, folder in folders.items() if (folder / "model_index.json").is_file()}
