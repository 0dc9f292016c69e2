"""What holds for the repository as a whole: imports, dangerous calls, docstrings, the wheel, the README's code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [
    path for folder in ("attngen", "pipelines", "train", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
LIBRARY = [path for path in CODE if path.is_relative_to(ROOT / "attngen")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


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
        assert name != "torch.save" or name_of(path) == "train/fid_extractors.py"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_go_one_way(path):
    names, place = imported(ast.parse(path.read_text())), path.relative_to(ROOT / "attngen")
    assert not any(name.split(".")[0] in ("pipelines", "train", "benchmarks", "tests") for name in names)
    if place.parts[0] not in ("hosts", "sit", "__init__.py"):
        assert not any(name.split(".")[0] == "diffusers" for name in names)
    if place.parts[0] == "kernels":
        allowed = ("attngen.kernels", "attngen.checks")
        assert not any(name.startswith("attngen.") and not name.startswith(allowed) for name in names)
    if place.parts[0] == "methods":
        assert not any(name.startswith(("attngen.hosts", "attngen.patch", "attngen.plan")) for name in names)


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
