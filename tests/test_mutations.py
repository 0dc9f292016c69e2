"""The faults of `python -m tests.mutation` fit the code, and the program judges them rightly."""

import ast
import sys
import types
from functools import cache
from pathlib import Path

import pytest

from tests import mutation
from tests.mutations import FAULTS, LATER, Fault

ROOT = Path(__file__).parents[1]


@cache
def functions_of(path):
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", FAULTS)
def test_the_target_and_the_tests_of_a_fault_exist(name):
    fault = FAULTS[name]
    _, _, original = mutation.find(fault.target)
    assert fault.change(original) is not original
    for test in fault.tests:
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file() and (not function or function in functions_of(path)), test


def test_there_are_many_faults_and_each_has_one_place():
    assert len(FAULTS) >= 40 and not set(FAULTS) & set(LATER)


@pytest.fixture
def package(monkeypatch):
    """Two modules of the project: one has a function, a class and a table, the other imports them."""
    first, second = types.ModuleType("attngen.first"), types.ModuleType("attngen.second")
    exec("import math\n\ndef root(x): return math.sqrt(x)\n\nclass Box:\n    def of(self): return 1\n", vars(first))
    vars(first)["TABLE"] = {"root": first.root}
    vars(second).update(root=first.root, math=first.math)
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return first, second


def test_a_fault_reaches_all_that_hold_its_target(package):
    first, second = package
    mutation.make(Fault("attngen.first:root", lambda original: lambda x: -original(x), ()))
    assert first.root(4) == second.root(4) == first.TABLE["root"](4) == -2
    mutation.make(Fault("attngen.first:Box.of", lambda original: lambda self: original(self) + 1, ()))
    assert first.Box().of() == 2


def test_a_module_is_replaced_in_one_module(package):
    import math

    from tests.mutations import called_with, with_function

    first, second = package
    mutation.make(Fault("attngen.first:math", with_function("sqrt", lambda original: lambda x: 7), ()))
    assert first.root(4) == 7 and second.math is math and math.sqrt(4) == 2
    mutation.make(Fault("attngen.first:math", called_with("isclose", abs_tol=1.0), ()))
    assert first.math.isclose(0.0, 0.5) and not math.isclose(0.0, 0.5)


@pytest.mark.parametrize(
    ("code", "text", "result"),
    [
        (0, "3 passed in 1 s", mutation.SURVIVED),
        (0, "3 skipped in 1 s", mutation.STALE),
        (1, "FAILED tests/a.py::test_b - assert 1 == 2\n", mutation.KILLED),
        (1, "/a/attngen/b.py:3: ValueError: no\nFAILED tests/a.py::test_b - ValueError\n", mutation.KILLED),
        (1, "/a/tests/mutations.py:3: TypeError: no\nFAILED tests/a.py::test_b - TypeError\n", mutation.STALE),
        (1, "/a/b.py:3: TypeError: x.<locals>.<lambda>() takes 2\nFAILED tests/a.py::test_b\n", mutation.STALE),
        (2, "ERROR tests/a.py - ImportError\n", mutation.STALE),
        (4, "ERROR: not found: tests/a.py::test_c\n", mutation.STALE),
        (mutation.NOT_MADE, "KeyError: 'root'", mutation.STALE),
        (None, "", mutation.SLOW),
    ],
)
def test_what_becomes_of_a_fault(code, text, result):
    assert mutation.verdict(code, text)[0] == result


@pytest.mark.parametrize(("codes", "result"), [((1, 0), mutation.KILLED), ((1, 1), mutation.STALE)])
def test_a_test_that_fails_without_the_fault_shows_nothing(monkeypatch, codes, result):
    codes, asked = iter(codes), []

    def run(fault, selected, log, timeout):
        asked.append((fault is not None, selected))
        log.write_text("FAILED tests/a.py::test_b - assert 1 == 2\n")
        return next(codes)

    monkeypatch.setattr(mutation, "run_tests", run)
    fault = Fault("attngen.tokens:pool_tokens", lambda original: None, ("tests/a.py",), only="b")
    assert mutation.attempt(fault, 1.0)[0] == result
    assert asked == [(True, ["tests/a.py", "-k", "b"]), (False, ["tests/a.py::test_b"])]
