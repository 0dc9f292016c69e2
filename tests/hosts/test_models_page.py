"""docs/models.md names the classes of the table, their host and their methods, and its example runs."""

import importlib
import pkgutil
import re

import diffusers
import torch
from diffusers.models import controlnets, transformers, unets

from attngen.hosts.families import FAMILIES, STAYS
from tests.hosts import models_table

ROOT = models_table.PAGE.parents[1]
PAGE = models_table.PAGE.read_text(encoding="utf-8")
NO_IMAGE = ("AceStep", "LongCatAudio", "MiniMaxMusic", "Prior", "RFD4", "StableAudio", "T5Film", "UNet1D")
NO_FORWARD = {"MotionAdapter", "ControlNetXSAdapter"}


def test_the_tables_are_those_of_the_code():
    """`python -m tests.hosts.models_table --write` puts them there."""
    assert models_table.replaced(PAGE) == PAGE


def test_numbers_of_classes_in_the_texts():
    core = sum(family.core is not None for family in FAMILIES.values())
    assert f"It works on {len(FAMILIES)} classes of models" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f" in {core} more classes of" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_class_of_diffusers_that_draws_has_a_row_or_a_reason():
    """Models of transformers, UNets and ControlNets; sound, text and proteins have no image."""
    found = set()
    for package in (transformers, unets, controlnets):
        for module in pkgutil.iter_modules(package.__path__):
            content = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            found |= {n for n, cls in content.items() if _is_model(cls) and cls.__module__.endswith(module.name)}
    drawing = {name for name in found if not name.startswith(NO_IMAGE) and "Multi" not in name}
    assert drawing - NO_FORWARD == (FAMILIES.keys() | STAYS.keys()) - {"SiTTransformer2DModel"}
    softmax = drawing - NO_FORWARD - {name for name in STAYS if name.startswith("Sana") and "Refiner" not in name}
    assert (len(softmax), len(softmax & FAMILIES.keys())) == (83, 78)


def _is_model(cls):
    return isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)


def test_the_example_of_a_class_of_ones_own_runs(capsys):
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "class " in code)
    try:
        with torch.random.fork_rng():
            exec(code, {"__name__": "example"})
    finally:
        FAMILIES.pop("PaintingTransformer", None)
    printed = capsys.readouterr().out
    assert "32x32" in printed and "agent (64)" in printed
