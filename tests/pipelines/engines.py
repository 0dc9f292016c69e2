"""What tests of the engine share."""

import numpy as np

from pipelines.engine.results import Progress
from pipelines.engine.settings import Settings


def last(events):
    """The result; all progress before it is told of in order."""
    *progress, result = list(events)
    assert all(isinstance(event, Progress) for event in progress)
    return result


def pixels(result, k=0):
    return np.asarray(result.pictures[k])


def drawn(engine, model, **settings):
    given = {"prompt": "face", "model": model, "steps": 3, **settings}
    return last(engine.generate(Settings(**given), previews=False))
