"""The documentation as a site, built as strictly as mkdocs does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material and mkdocstrings (the docs extra)")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs mkdocstrings (the docs extra)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_site_builds_without_a_warning_and_asks_no_other_server(site):
    page = (site / "index.html").read_text()
    assert "Three lines" in page and not re.findall(r'(?:src|href)="https?://(?:fonts|cdn|unpkg)', page)


def test_every_public_name_has_its_place_in_the_reference(site):
    import attngen

    pages = "".join(path.read_text() for path in (site / "api").rglob("index.html"))
    names = [name for name in attngen.__all__ if name not in ("functional", "PRESETS")]
    names += [f"functional.{name}" for name in attngen.functional.__all__]
    missing = [name for name in names if f'id="attngen.{name}"' not in pages]
    assert not missing, f"no page of docs/api has {missing}"
