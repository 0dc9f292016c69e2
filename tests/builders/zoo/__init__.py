"""Tiny configurations of diffusers' denoisers, one row a class: `ZOO["FluxTransformer2DModel"].model()`.

Every module of this package but `base` has a `ROWS` made by `base.rows`; a new module needs no entry here.
"""

import importlib
import pkgutil

from tests.builders.zoo.base import Tiny

ZOO: dict[str, Tiny] = {}
APART: dict[str, Tiny] = {}
"""Rows whose calls cannot be cut into samples by the first axis of each argument."""
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        _imported = importlib.import_module(f"{__name__}.{_module.name}")
        _rows = _imported.ROWS
        assert not ZOO.keys() & _rows.keys(), f"{_module.name} repeats {sorted(ZOO.keys() & _rows.keys())}"
        ZOO |= _rows
        APART |= getattr(_imported, "APART", {})
