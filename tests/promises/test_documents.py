"""Promise: what the documents say can be run. Names in Python, programs and options in shell, tests in the table."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "train/data/README.md"] if path.is_file()
)
PACKAGES = ("attngen", "pipelines", "train", "benchmarks", "tests", "app")


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def resolve(node: ast.expr, known: dict[str, Any]) -> Any:
    """The object an attribute chain like `attngen.functional.pool_tokens` means, or None where it starts elsewhere."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, known)
        return None if owner is None or not hasattr(owner, "__name__") else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_names_in_python_examples_exist(document):
    """Every import and attribute of ours; keyword arguments of what is called."""
    import attngen

    # Examples go on from one another: what the first imports the next may use.
    known: dict[str, Any] = {"attngen": attngen}
    for block in blocks(document, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known |= {(a.asname or a.name): importlib.import_module(a.name) for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                known |= {(a.asname or a.name): getattr(module, a.name) for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                resolve(node, known)  # AttributeError where it does not exist
            if isinstance(node, ast.Call):
                check_keywords(resolve(node.func, known), node)


def check_keywords(function: Any, call: ast.Call) -> None:
    import inspect

    if function is None or not str(getattr(function, "__module__", "")).startswith("attngen"):
        return
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    unknown = {keyword.arg for keyword in call.keywords} - {parameter.name for parameter in parameters} - {None}
    assert not unknown, f"{function.__name__} has no {unknown}"


@cache
def help_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{module}: {done.stderr}"
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, comments and line breaks taken out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def programs(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs and its options, or None."""
    if "-m" not in words or not any("python" in word for word in words[: words.index("-m")]):
        return None
    place = words.index("-m") + 1
    return words[place], [word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_programs_in_shell_examples_exist(document):
    """Every `python -m` of ours, and each of its options."""
    for words in [words for block in blocks(document, "bash") for words in commands(block)]:
        found = programs(words)
        if found is None or found[0].split(".")[0] not in PACKAGES:
            continue
        module, options = found
        for option in options:
            assert re.search(rf"{re.escape(option)}(?![\w-])", help_of(module)), f"{module} has no {option}"
        assert options or importlib.util.find_spec(module) is not None


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_tests_that_show_the_promises_exist():
    table = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", table)
    assert len(named) > 40
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert not name or name in functions_of(path), f"{path}::{name}"
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)]
    assert numbers == list(range(1, 30))
