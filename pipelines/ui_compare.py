"""The tab that draws the same picture by several methods and shows what each costs and changes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.comparison import DIFFERENCE_GAIN, Comparison, difference
from pipelines.engine.models import Model
from pipelines.engine.results import save
from pipelines.engine.rounds import Measured, measure
from pipelines.engine.session import Engine
from pipelines.images import enlarge, grid
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import MEDIATORS, PLAN, UNCHANGED
from pipelines.methods.uses import Use, parse_use
from pipelines.ui_events import EXPECTED, QUIET, Buttons, Wrap, as_gradio_error, bounded, follow, refused, stop_of
from pipelines.ui_form import Form
from pipelines.ui_remember import Check
from pipelines.ui_shown import title_of

MAX_METHODS = 8
SHOWN_SIZE = 512  # small pictures are enlarged to about this for the slider, in whole pixels
HEAD = ("Method", "GFLOP", "Operations saved", "Seconds", "Times faster", "Difference", "Peak memory")
QUIET_CELL = "color: var(--body-text-color-subdued)"
VISIBLE = 0.02  # error below which two pictures look alike


class CompareTab:
    """Compares methods on what the form of the Generate tab holds.

    Args:
        engine: that draws.
        folder: where pictures are written.
        form: that sets what to draw.
        wrap: put around what draws.
    """

    def __init__(self, engine: Engine, folder: Path, form: Form, wrap: Wrap) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, form, wrap
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.methods = gr.Dropdown(
                    choices_of(form.first), value=suggestions(form.first)[:4], multiselect=True,
                    max_choices=MAX_METHODS, allow_custom_value=True, label="Methods to compare",
                    info="The first is the baseline. Type your own: agent 64 min_tokens=0", elem_id="methods",
                )  # fmt: skip
                self.add = gr.Button("Add the method chosen on Generate", size="sm", elem_id="add-method")
            with gr.Column(scale=2, min_width=280):
                gr.Markdown(
                    "Model, prompt, size, steps, the number in *Seed* and the number of pictures are those of the"
                    " Generate tab. Times are medians of up to seven rounds of all methods in turn."
                )
                with gr.Row():
                    start = gr.Button("Compare", variant="primary", elem_id="compare", elem_classes=["start-button"])
                    stop = gr.Button("Stop", interactive=False, elem_id="compare-stop", elem_classes=["stop-button"])
        self.status = gr.Textbox(
            "Ready.", label="Status", interactive=False, max_lines=4, elem_id="compare-status", elem_classes=["line"]
        )
        self.buttons = Buttons(start, stop, self.status)
        self.table = gr.Dataframe(
            headers=list(HEAD), label="Cost, and difference from the first", interactive=False, wrap=True,
            column_widths=["21%", "9%", "12%", "10%", "20%", "14%", "14%"], elem_id="table",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=300):
                self.against = gr.Radio([], label="Compare with the first", elem_id="against")
                self.slider = gr.ImageSlider(
                    label="The first, left, and the one chosen, right", type="pil", format="png", max_height=420,
                    interactive=False, elem_id="slider",
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.side = gr.Gallery(
                    label="Side by side", columns=3, height="auto", object_fit="contain", fit_columns=False,
                    format="png", interactive=False, buttons=["download", "download_all", "fullscreen"],
                    elem_id="side", elem_classes=["tiny-pictures"],
                )  # fmt: skip
                self.apart = gr.Image(
                    label=f"Difference, {DIFFERENCE_GAIN} times as bright", type="pil", format="png", height=260,
                    interactive=False, buttons=["download"], elem_id="difference", elem_classes=["tiny-pictures"],
                )  # fmt: skip
        with gr.Accordion("All pictures on one sheet: one row per method, one column per seed", open=False):
            self.sheet = gr.Image(
                label="Sheet", type="pil", format="png", interactive=False, buttons=["download", "fullscreen"],
                elem_id="sheet",
            )  # fmt: skip
        self.files = gr.State([])  # the first picture of each method
        form.followers.append(self._follow)
        form.followed.append(self.methods)

    def wire(self) -> None:
        """Connect it; after the form's tab is wired."""
        outputs = [self.table, self.against, self.slider, self.side, self.apart, self.sheet, self.files]
        inputs = [self.methods, *self.form.inputs]
        self.buttons.wire([self.buttons.start.click], self.wrap(self.draw), inputs, outputs)
        self.against.input(self._choose, [self.against, self.files], [self.slider, self.apart], **QUIET)
        self.add.click(self._add, inputs, [self.methods, self.status], preprocess=False, **QUIET)

    @property
    def kept(self) -> dict[Any, Check]:
        """Fields that the browser keeps."""
        return {self.methods: usable_methods}

    def draw(self, key: str, methods: Any, *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Draw and compare."""
        try:
            uses = parse_methods(methods)
            settings = self.engine.check(self.form.settings(*values, shown_seed=True).with_use(Use()))
        except EXPECTED as error:
            yield refused(error, self.status)
            return
        yield {self.slider: None, self.apart: None, self.side: None, self.sheet: None, self.table: None, self.files: []}
        stop = stop_of(key)
        events = bounded(measure(self.engine, settings, uses, stop=stop), stop, self.engine.limits.seconds)
        yield from follow(events, self.status, lambda progress: {}, self._finish)

    def _finish(self, found: Measured) -> dict[Any, Any]:
        rows, settings = found.comparison.rows, found.comparison.rows[0].result.settings
        model = self.engine.models.get(settings.model)
        titles = [title_of(model, row.result.settings.use) for row in rows]
        files = [str(save(row.result, self.folder).files[0]) for row in rows]
        last = len(rows) - 1
        slider, apart = shown_pair(files[0], files[last])
        rounds = len(found.seconds[0])
        return {
            self.status: f"Done: {settings.prompt}, seed {settings.seed}, steps: {settings.steps}. Times are medians of"
            f" {rounds} round{'s' if rounds > 1 else ''} of {found.steps} steps; warm-up steps are not timed.",
            self.table: table_of(found, titles),
            self.against: gr.update(choices=[(title, i) for i, title in enumerate(titles)], value=last),
            self.slider: slider,
            self.side: list(zip(files, titles, strict=True)),
            self.apart: apart,
            self.sheet: comparison_sheet(found.comparison, titles),
            self.files: files,
        }

    def _choose(self, row: int, files: list[str]) -> tuple[Any, Any]:
        return shown_pair(files[0], files[row]) if files and row is not None else (None, None)

    def _add(self, methods: list[str], *values: Any) -> dict[Any, Any]:
        try:
            use = self.form.settings(*values).use.checked()
            if use.method == PLAN:
                raise UserError("a plan is too long for this list; draw with it on Generate")
        except EXPECTED as error:
            raise as_gradio_error(error) from error
        return {self.methods: list(dict.fromkeys([*(methods or []), use.text])), self.status: f"Added {use.label}."}

    def _follow(self, model: Model) -> dict[Any, Any]:
        return {self.methods: gr.update(choices=choices_of(model), value=suggestions(model)[:4])}


def parse_methods(typed: Any) -> list[Use]:
    """The methods to compare.

    Raises:
        UserError: for too few or too many, or what is no method.
    """
    if not isinstance(typed, (list, tuple)) or len(typed) < 2:
        raise UserError("a comparison needs at least two methods; choose another one")
    if len(typed) > MAX_METHODS:
        raise UserError(f"at most {MAX_METHODS} methods are compared at once, got {len(typed)}")
    return [parse_use(str(method)) for method in typed]


def table_of(found: Measured, titles: Sequence[str]) -> dict[str, Any]:
    """Cells for `HEAD`, a row a method; what cannot be told from the first method is grey."""
    data, styles = [], []
    for i, (row, title) in enumerate(zip(found.comparison.rows, titles, strict=True)):
        result, speed, ratio = row.result, found.speed(i), row.flops_ratio
        saved = None if ratio is None else 1 - 1 / ratio
        peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f} MiB ({result.memory_of})"
        alike = "equal" if row.error == 0 else f"{row.error:.4f}, {'visible' if row.error > VISIBLE else 'not visible'}"
        data.append([
            title,
            "" if result.flops is None else f"{result.flops / 1e9:,.1f}",
            "" if saved is None or not i else f"{saved:.1%}",
            f"{found.median_seconds(i):.2f}",
            str(speed) if i else "1",
            "the first" if not i else alike,
            peak,
        ])  # fmt: skip
        styles.append([QUIET_CELL if column == 4 and i and not speed.differs else "" for column in range(len(HEAD))])
    return {"headers": list(HEAD), "data": data, "metadata": {"styling": styles}}


def shown_pair(first: str, other: str) -> tuple[tuple[Any, Any], Any]:
    """The two pictures, large enough for the slider, which smooths what it enlarges, and their difference."""
    from PIL import Image

    pair = [Image.open(file).convert("RGB") for file in (first, other)]
    scale = max(1, SHOWN_SIZE // max(pair[0].size))
    return (enlarge(pair[0], scale), enlarge(pair[1], scale)), enlarge(difference(*pair), scale)


def usable_methods(typed: Any, model: Model) -> list[str]:
    """Of the methods typed those that the model can be drawn with."""
    found = []
    for use in typed if isinstance(typed, list) else []:
        try:
            if parse_use(str(use)).method in model.methods:
                found.append(str(use))
        except UserError:
            continue
    return found[:MAX_METHODS]


def suggestions(model: Model) -> list[str]:
    """Methods worth comparing on a model, as texts; the first is the baseline."""
    found = [UNCHANGED]
    if MEDIATORS not in model.refused:
        found += [f"{MEDIATORS} 1", f"{MEDIATORS} 4", f"{MEDIATORS} 64", f"{MEDIATORS} 1:4,0.5:16,0.2:25"]
    if "agent" not in model.refused:
        small = max(model.size or (512, 512)) <= 64
        rest = " min_tokens=0" if small else ""
        others = [name for name in model.methods if name != "agent" and METHODS[name].is_usual]
        found += [f"agent 64{rest}", *others[:1], f"agent 16{rest}", *others[1:], "softmax"]
    return found


def choices_of(model: Model) -> list[tuple[str, str]]:
    """`suggestions` with the titles that the page shows."""
    return [(title_of(model, parse_use(text)) if text == UNCHANGED else text, text) for text in suggestions(model)]


def comparison_sheet(found: Comparison, titles: Sequence[str]) -> Any:
    """One labelled picture: a row a method, a column a seed."""
    first = found.rows[0].result
    scale = max(1, 128 // max(first.pictures[0].size))
    seeds = [(str((first.settings.seed or 0) + k), 1) for k in range(len(first.pictures))]
    return grid([row.result.pictures for row in found.rows], row_labels=list(titles), groups=seeds, scale=scale)
