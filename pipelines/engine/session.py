"""The engine of the page and the programs: settings in, progress out, pictures at the end; nothing of Gradio here.

    engine = Engine()
    for event in engine.generate(Settings(prompt="clock", seed=7)):
        print(event)  # Progress, and a Result at last

That work runs in a thread of its own, so a caller that stops listening (closes the generator) stops it within one call
of the network. One picture is drawn at a time, so that not a bit of it depends on what is drawn with it. `Engine.draw`
does the same here and now, and in batches if asked to.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.background import Tell, held, run_in_thread
from pipelines.engine.comparison import WARM_UP_STEPS, Comparison, compare_results
from pipelines.engine.draw import call_arguments, draw, fit
from pipelines.engine.models import CLASSES, Model, ModelStore
from pipelines.engine.results import Progress, Result
from pipelines.engine.settings import UNLIMITED, Limits, Settings, whole
from pipelines.engine.shipped import DEFAULT_MODEL
from pipelines.methods.options import UNCHANGED
from pipelines.methods.uses import Use

if TYPE_CHECKING:
    from attngen import Plan

STORE_OPTIONS = ("device", "dtype", "threads", "offload", "allow_pickle", "config", "revision", "variant")


class Engine:
    """Draws and compares.

    Args:
        models: where models come from.
        limits: the most that is drawn.
    """

    def __init__(self, models: ModelStore | None = None, limits: Limits | None = None) -> None:
        self.models = models or ModelStore()
        self.limits = limits or Limits()

    @property
    def default_model(self) -> str:
        """Name of the model to start with."""
        return self.models.names[0] if self.models.names else DEFAULT_MODEL

    def check(self, settings: Settings) -> Settings:
        """Everything that can be checked before the model is loaded; see `Settings.checked`."""
        checked = settings.checked(self.limits)
        self.models.check(checked.model)
        return checked

    def generate(
        self,
        settings: Settings,
        previews: bool = True,
        count_flops: bool = False,
        stop: threading.Event | None = None,
    ) -> Generator[Progress | Result, None, None]:
        """Draw; yields `Progress` and at last one `Result`. Nothing is written; see `pipelines.engine.results.save`.

        Args:
            settings: what to draw.
            previews: whether progress holds small pictures.
            count_flops: whether to count the operations, which costs one more network call of each kind.
            stop: where this is set, `pipelines.engine.calls.Stopped` is raised at the next call of the network.

        Raises:
            UserError: for settings that cannot be used, before work.
            OSError: for a model that cannot be loaded.
            FloatingPointError: if a picture is not finite.
            MemoryError: with what to do about it; what was taken is given back.
        """
        checked = self.check(settings)

        def work(tell: Tell, stop: threading.Event) -> Result:
            return self.draw([checked], tell, stop, previews, count_flops)

        yield from run_in_thread(work, self.models.forget, stop)

    def draw(
        self,
        sheet: Sequence[Settings],
        tell: Tell = lambda progress: None,
        stop: threading.Event | None = None,
        previews: bool = False,
        count_flops: bool = False,
        batch: int = 1,
        patch: Any = None,
    ) -> Result:
        """Draw in this thread and return the `Result`.

        Args:
            sheet: what to draw; several of them differ in prompt, seed and number of pictures only.
            tell: is told how far it is.
            stop: where this is set, `pipelines.engine.calls.Stopped` is raised at the next call of the network.
            previews: whether progress holds small pictures.
            count_flops: see `generate`.
            batch: most pictures in one call of the pipeline. Each has its own noise, so it is the same in any batch
                but for rounding, which the size of a matrix product decides.
            patch: what `attngen.apply` gets instead of the settings' method, such as the name of a file.

        Raises:
            UserError: and what else `generate` raises, but for memory: PyTorch's own error.
        """
        if patch is not None and any(settings.method != UNCHANGED for settings in sheet):
            raise ValueError("either the settings have a method, or there is a patch")
        checked = [self.check(settings) for settings in sheet]
        alone = {"prompt": "", "seed": 0, "images": 1}
        if any(replace(one, **alone) != replace(checked[0], **alone) for one in checked):
            raise ValueError("settings of one sheet differ in prompt, seed and number of images only")
        stop = stop or threading.Event()
        model = self._ready(checked[0].model, tell, stop)
        with held(model, tell, stop):
            fitted = [fit(one, model, self.limits) for one in checked]
            return draw(model, fitted, tell, stop, previews, count_flops, batch, patch)

    def compare(
        self,
        settings: Settings,
        uses: Sequence[Use],
        previews: bool = True,
        lpips: bool = False,
        stop: threading.Event | None = None,
    ) -> Generator[Progress | Comparison, None, None]:
        """The same pictures by two or more methods, the first of which the others are compared with.

        Each method draws `WARM_UP_STEPS` steps before its time is taken; those are in no number.

        Args:
            settings: what to draw; its method and options play no part.
            uses: the methods, each with options.
            previews: whether progress holds small pictures.
            lpips: whether to compute LPIPS, whose weights may be downloaded; see `pipelines.engine.paired`.
            stop: see `generate`.

        Raises:
            UserError: for fewer than two methods, or what `generate` raises it for, for any of them.
        """
        if len(uses) < 2:
            raise cli.UserError(f"a comparison needs at least two methods, got {len(uses)}")
        base = self.check(settings)
        variants = [self.check(base.with_use(use)) for use in uses]

        def work(tell: Tell, stop: threading.Event) -> Comparison:
            model = self._ready(base.model, tell, stop)
            with held(model, tell, stop):
                fitted = [fit(variant, model, self.limits) for variant in variants]
                results = []
                for i, variant in enumerate(fitted):
                    which = f"{variant.use.label} ({i + 1} of {len(fitted)})"
                    short = replace(variant, steps=min(WARM_UP_STEPS, variant.steps or 1), images=1)
                    draw(model, [short], _renamed(tell, f"warming up {which}"), stop)
                    results.append(draw(model, [variant], _renamed(tell, which), stop, previews, count_flops=True))
            return compare_results(results, lpips)

        yield from run_in_thread(work, self.models.forget, stop)

    def calibrate(
        self,
        settings: Settings,
        max_error: float | None = None,
        speedup: float | None = None,
        num_stages: int = 3,
        stop: threading.Event | None = None,
    ) -> Generator[Progress | Plan, None, None]:
        """Measure the model's layers on these settings and choose a plan; yields `Progress` and at last the plan.

        Args:
            settings: what to draw while measuring; the method and its options play no part.
            max_error: most relative error of the result; see `attngen.calibrate`. One of this and `speedup`.
            speedup: how many times faster attention is to be.
            num_stages: parts of the way from noise to picture that may have methods of their own.
            stop: see `generate`.

        Raises:
            UserError: for what cannot be used, or a bound that no plan keeps.
        """
        base = self.check(settings.with_use(Use()))
        if (max_error is None) == (speedup is None):
            raise cli.UserError("calibration needs either a maximum error or a speed-up")
        whole("num_stages", num_stages, 1, 16)

        def work(tell: Tell, stop: threading.Event) -> Plan:
            model = self._ready(base.model, tell, stop)
            with held(model, tell, stop):
                return _calibrate(model, fit(base, model, self.limits), max_error, speedup, num_stages, tell, stop)

        yield from run_in_thread(work, self.models.forget, stop)

    def warm_up(self, name: str | None = None) -> Model:
        """Load a model and draw a little with it, so that the first picture does not pay for first calls."""
        model = self.models.get(name or self.default_model)
        prompt = str(min(model.labels, default=0)) if model.kind == CLASSES else "a picture"
        short = fit(Settings(prompt=prompt, model=model.name, steps=1), model, self.limits)
        stop = threading.Event()
        with held(model, lambda progress: None, stop):
            draw(model, [short], lambda progress: None, stop)
        return model

    def load(self, name: str, stop: threading.Event | None = None) -> Generator[Progress | Model, None, None]:
        """Load a model; yields `Progress` and at last the model. Where `stop` is set only the waiting ends.

        Raises:
            UserError: if it cannot be a model here.
            OSError: if it cannot be loaded.
        """
        yield from run_in_thread(lambda tell, ended: self._ready(name, tell, ended), self.models.forget, stop)

    def _ready(self, name: str, tell: Tell, stop: threading.Event) -> Model:
        tell(Progress(f"loading {cli.public_name(name)}"))
        return self.models.get(name, tell, stop)


def _renamed(tell: Tell, what: str) -> Tell:
    return lambda progress: tell(replace(progress, what=what))


def _calibrate(
    model: Model,
    settings: Settings,
    max_error: float | None,
    speedup: float | None,
    num_stages: int,
    tell: Tell,
    stop: threading.Event,
) -> Plan:
    try:
        from attngen.calibration import calibrate
    except ImportError as error:
        raise cli.UserError(f"this attngen cannot calibrate: {error}") from error
    from pipelines.engine.calls import CallWatch, watched

    if "plan" in model.refused:
        raise cli.UserError(f"{model.name} cannot be calibrated: {model.refused['plan']}")
    watch = CallWatch(stop)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        tell(Progress(f"measuring, network call {calls}"))

    watch.listener = count
    bound = {"max_error": max_error} if speedup is None else {"speedup": speedup}
    try:
        with watched(model.pipe, watch):
            return calibrate(
                model.pipe, **bound, num_stages=num_stages, seed=settings.seed or 0, **call_arguments(model, [settings])
            )
    except ValueError as error:
        raise cli.UserError(str(error)) from error


# As the programs run it


def make_engine(options: argparse.Namespace) -> Engine:
    """An engine without limits, from a program's parsed arguments, as far as it has those of a `ModelStore`."""
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in STORE_OPTIONS}
    return Engine(ModelStore(**given), UNLIMITED)


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """A progress bar, on a terminal only: yields what updates it."""
    from tqdm import tqdm

    with tqdm(total=100, disable=not sys.stderr.isatty(), leave=False, bar_format="{l_bar}{bar}| {desc}") as bar:

        def tell(progress: Progress) -> None:
            bar.set_description_str(str(progress), refresh=False)
            bar.n = round(100 * progress.share)
            bar.refresh()

        yield tell
