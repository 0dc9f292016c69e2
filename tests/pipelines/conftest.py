"""Tiny models, an engine over them, for the tests of this folder."""

import pytest

from pipelines.engine.models import ModelStore
from pipelines.engine.session import Engine
from pipelines.engine.settings import Limits
from tests.builders.programs import save_sit


@pytest.fixture(scope="session")
def mediator(tmp_path_factory):
    return save_sit(tmp_path_factory.mktemp("models") / "mediator")


@pytest.fixture(scope="session")
def softmax(tmp_path_factory):
    return save_sit(tmp_path_factory.mktemp("models") / "softmax", "softmax")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.builders.programs import build_sd

    folder = tmp_path_factory.mktemp("models") / "texts"
    build_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine():
    return Engine(ModelStore(), Limits(pixels=256 * 256, steps=100, images=8, characters=200))
