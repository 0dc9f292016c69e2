"""The page with a model that fails when a test asks it to: python -m tests.app.faulty takes the options of app.py.

The seed of a picture decides, so one page shows every fault and draws well in between.
"""

import functools
import sys
import time

import torch

import app
from attngen import SiTPipeline
from pipelines.engine import models
from tests.app.serving import NOT_FINITE, OUT_OF_MEMORY, SLOW_MODEL


def fail_by_seed(draw):
    """A pipeline's call whose network runs out of memory in its second step, or computes NaN, for these two seeds."""

    @functools.wraps(draw)
    def call(pipe, *args, generator=None, **kwargs):
        calls = []

        def fault(module, given, output):
            calls.append(1)
            if seed == NOT_FINITE:
                return (torch.full_like(output[0], torch.nan),)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        first = generator[0] if isinstance(generator, list) else generator
        seed = first.initial_seed()
        if seed not in (OUT_OF_MEMORY, NOT_FINITE):
            return draw(pipe, *args, generator=generator, **kwargs)
        hook = pipe.transformer.register_forward_hook(fault)
        try:
            return draw(pipe, *args, generator=generator, **kwargs)
        finally:
            hook.remove()

    return call


def fetch_slowly(fetch):
    """A download of one model that never ends."""

    @functools.wraps(fetch)
    def call(model, options):
        while model == SLOW_MODEL:
            time.sleep(1)
        return fetch(model, options)

    return call


if __name__ == "__main__":
    models.fetch = fetch_slowly(models.fetch)
    SiTPipeline.__call__ = fail_by_seed(SiTPipeline.__call__)
    sys.exit(app.main())
