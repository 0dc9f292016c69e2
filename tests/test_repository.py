"""What holds for the repository as a whole: imports, dangerous calls, docstrings, the wheel, the README's code."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [
    *(
        path
        for folder in ("attngen", "pipelines", "train", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
    ROOT / "app.py",
]
LIBRARY = [path for path in CODE if path.is_relative_to(ROOT / "attngen")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in CODE}

_GROUND = ("checks", "tokens", "kernels")
MAY_IMPORT = {
    # A part of the library, a file or folder -> the other parts that it may import.
    "version": (),
    "checks": (),
    "files": (),
    "schedule": (),
    "tokens": ("checks",),
    "kernels": ("checks", "files", "tokens", "version"),
    "layers": _GROUND,
    "methods": (*_GROUND, "layers"),
    "functional": ("tokens", "methods"),
    "hub": (),
    "measurements": ("files", "methods"),
    "plan": ("checks", "files", "hub", "schedule", "measurements", "methods"),
    "presets": ("methods", "plan"),
    "sit": (*_GROUND, "layers", "methods"),
    # Learned layers are found by the hosts, which attach and detach their weights.
    "hosts": (*_GROUND, "layers", "methods", "plan", "schedule", "sit", "learned"),
    "learned": (*_GROUND, "files", "version", "layers", "methods", "plan", "hosts"),
    "tables": (),
    "report": ("checks", "kernels", "tables"),
    "layer_rows": (*_GROUND, "layers", "methods", "hosts", "learned", "report"),
    "trace": ("layers", "hosts", "tables"),
    "patch": (
        *(*_GROUND, "hub", "layers", "methods", "schedule", "plan", "presets", "hosts", "learned"),
        *("layer_rows", "report", "trace"),
    ),
    "calibration": (
        *(*_GROUND, "files", "version", "schedule", "measurements", "layers", "methods"),
        *("plan", "hosts", "learned", "layer_rows"),
    ),
    # The programs: their own folders, and the library.
    "app": ("pipelines", "attngen"),
    "pipelines": ("attngen",),
    "train": ("pipelines", "attngen"),
    "benchmarks": ("pipelines", "train", "attngen"),
}
KNOW_DIFFUSERS = ("attngen", "hosts", "sit", "patch")
"""Parts of the library that import diffusers; `attngen` is its `__init__`."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imported(path: Path) -> frozenset[str]:
    """Modules that a file imports, also inside its functions; what it imports for type checkers alone is none."""
    tree = ast.parse(path.read_text())
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typed for statement in node.body for inner in ast.walk(statement)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name_of(path)} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return frozenset(names)


def part_of(module: str) -> str:
    """The file or folder of the library that a module belongs to; of a program its top folder."""
    top, *rest = module.split(".")
    return rest[0] if top == "attngen" and rest else top


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_nothing_that_runs_or_unpickles_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load", "os.system"), name
        if name == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        assert not name.startswith(("pickle.", "marshal."))
        # One call writes a file in memory, for torch-fidelity, which reads its weights from nothing else.
        assert name != "torch.save" or name_of(path) == "train/metrics/inception.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    part, library = part_of(module), module.split(".")[0] == "attngen"
    names = imported(MODULES[module])
    if library and part not in KNOW_DIFFUSERS:
        assert not [name for name in names if name.split(".")[0] == "diffusers"]
    if part == "kernels":
        assert {name.split(".")[0] for name in names} <= {"attngen", "torch", "triton", *sys.stdlib_module_names}
    if module == "attngen":  # it imports all of itself
        return
    ours = [name for name in names if name in MODULES or name.split(".")[0] == "tests"]
    parts = {part_of(name) if library else name.split(".")[0] for name in ours}
    assert parts - {part} <= set(MAY_IMPORT[part])


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the modules


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_every_public_name_exists():
    import attngen

    for name in attngen.__all__:
        assert getattr(attngen, name) is not None
    for name in attngen.functional.__all__:
        assert callable(getattr(attngen.functional, name))


@pytest.mark.parametrize("document", ["README.md", "docs/patching.md", "docs/kernels.md", "train/data/README.md"])
def test_the_code_in_documents_parses(document):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("draw", "test"):
        assert readme.count(f"<!-- command: {command} -->\n```bash\n") == 1
        assert f'readme_block "command: {command}"' in ci
    assert ".venv/bin/python -m pytest\n" in readme


def test_links_in_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", document.read_text()):
            assert (document.parent / target.partition("#")[0]).exists(), f"{document.name}: {target}"


def test_the_wheel_holds_the_library_alone_and_imports(tmp_path):
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling (the dev extra)")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"attngen"}
    assert "attngen/py.typed" in names and "attngen/assets/emoji/model_index.json" in names
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1]); import attngen; assert attngen.__file__.startswith(sys.argv[1]);"
        "from pathlib import Path; p = Path(attngen.__file__).parent / 'assets/emoji';"
        "pipe = attngen.SiTPipeline.from_pretrained(p); print(pipe.id2label[0])"
    )
    (tmp_path / "empty").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "site")], cwd=tmp_path / "empty", capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "face", ran.stderr
