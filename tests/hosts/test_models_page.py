"""docs/models.md names the classes of the table, their host and their methods, and its example runs."""

import re
from pathlib import Path

import torch

from attngen.hosts.families import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(FAMILIES)
    for name, host, text, methods in rows:
        family = FAMILIES[name]
        assert host == ("layer" if family.core is None else "core"), name
        assert family.core is None or text == family.core.text, name
        assert ("merging" in methods) == (family.core is None), name
        assert ("focal, linear" in methods) == (not family.rotary), name


def test_the_example_of_a_class_of_ones_own_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    try:
        with torch.random.fork_rng():
            exec(code, {"__name__": "example"})
    finally:
        FAMILIES.pop("PaintingTransformer", None)
    printed = capsys.readouterr().out
    assert "32x32" in printed and "agent (64)" in printed
