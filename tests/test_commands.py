"""Every command of train and pipelines in a document parses as it is printed."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("attngen/assets/*/README.md")),
    ROOT / "train" / "data" / "README.md",
]


def shell_lines(text: str) -> list[str]:
    """Lines of shell blocks, those that go on joined, and code between backticks that has options."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose) if " --" in code]
    return [line for line in (*joined, *inline) if re.search(r"-m (train|pipelines)\.", line) and "…" not in line]


def commands() -> list[tuple[str, str, list[str]]]:
    """(where, program, arguments) of every command."""
    found = []
    for document in DOCUMENTS:
        for line in shell_lines(document.read_text(encoding="utf-8")):
            words = shlex.split(line, comments=True)
            place = words.index("-m")
            arguments = [word.replace("$method", "softmax").rstrip(";") for word in words[place + 2 :]]
            found.append((document.name, words[place + 1], arguments))
    for results in sorted(ROOT.glob("docs/quality/*.json")):
        words = shlex.split(json.loads(results.read_text())["command"])
        found.append((results.name, words[2], words[3:]))
    return found


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        pytest.param(program, arguments, id=f"{where}-{program}-{number}")
        for number, (where, program, arguments) in enumerate(commands())
    ],
)
def test_a_published_command_parses(program, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag, value in itertools.pairwise(arguments):
        if flag == "--resume" and not value.startswith("-"):
            (tmp_path / value).mkdir(parents=True)
            (tmp_path / value / "config.json").write_text('{"arguments": {}}' if program == "train.distill" else "{}")
    try:
        importlib.import_module(program).parse_arguments(arguments)
    except SystemExit as exit:
        assert not exit.code, f"python -m {program} {shlex.join(arguments)}"


def test_published_quality_names_its_plans_and_rows():
    for results in sorted(ROOT.glob("docs/quality/*.json")):
        found = json.loads(results.read_text())
        words = shlex.split(found["command"])
        rows = words[words.index("--rows") + 1 :]
        assert rows == [row["row"] for row in found["rows"]], results.name
        for name, path in (word.split("=") for word in words if "=" in word):
            assert name in rows and (ROOT / path).is_file(), f"{results.name}: {path}"
