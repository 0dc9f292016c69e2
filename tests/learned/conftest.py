"""Every method of learned layers on every kind of model that can have them, without gradients."""

import pytest
import torch

from tests.builders.learned import METHODS, NAMES


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param
