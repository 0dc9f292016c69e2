"""The tab that draws the same picture by several methods and shows what each costs and changes."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.comparison import COLUMNS, DIFFERENCE_GAIN, Comparison
from pipelines.engine.models import Model
from pipelines.engine.results import Progress, save
from pipelines.engine.session import Engine
from pipelines.images import enlarge, grid, save_png
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import MEDIATORS
from pipelines.methods.uses import Use, parse_use
from pipelines.ui_events import EXPECTED, Wrap, as_gradio_error, follow, message_of, started_and_stopped
from pipelines.ui_form import Form
from pipelines.ui_remember import Check

MAX_METHODS = 8
SHOWN_SIZE = 256  # small pictures are enlarged to about this for slider and sheet, in whole pixels


class CompareTab:
    """Compares methods on what the form of the Generate tab says.

    Args:
        engine: that draws.
        folder: where pictures are written.
        form: that says what to draw.
        wrap: put around what draws.
    """

    def __init__(self, engine: Engine, folder: Path, form: Form, wrap: Wrap) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, form, wrap
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.methods = gr.Dropdown(
                    suggestions(form.first),
                    value=suggestions(form.first)[:3],
                    multiselect=True,
                    max_choices=MAX_METHODS,
                    allow_custom_value=True,
                    label="Methods to compare",
                    info="The first is the baseline. Type your own: agent 64 min_tokens=0",
                    elem_id="methods",
                )
                self.add = gr.Button("Add the method chosen on Generate", size="sm", elem_id="add-method")
            with gr.Column(scale=2, min_width=280):
                gr.Markdown(
                    "Model, prompt, size, steps, seed and number of pictures are those of the Generate tab. "
                    "Each method has 2 warm-up steps, not timed."
                )
                with gr.Row():
                    self.start = gr.Button(
                        "Compare  (Ctrl+Enter)", variant="primary", elem_id="compare", elem_classes=["start-button"]
                    )
                    self.stop = gr.Button(
                        "Stop  (Esc)", variant="stop", interactive=False, elem_id="compare-stop",
                        elem_classes=["stop-button"],
                    )  # fmt: skip
        self.status = gr.Textbox("Ready.", label="Status", interactive=False, max_lines=4, elem_id="compare-status")
        self.table = gr.Dataframe(
            headers=list(COLUMNS), label="Cost, and difference from the first", interactive=False, wrap=True,
            elem_id="table",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=300):
                self.against = gr.Radio([], label="Show against the first", elem_id="against")
                self.slider = gr.ImageSlider(
                    label="The first, left, and the one chosen, right", type="filepath", format="png", max_height=420,
                    interactive=False, elem_id="slider",
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.side = gr.Gallery(
                    label="Side by side", columns=3, height=300, object_fit="contain", fit_columns=False, format="png",
                    interactive=False, buttons=["download", "fullscreen"], elem_id="side",
                    elem_classes=["tiny-pictures"],
                )  # fmt: skip
                self.apart = gr.Image(
                    label=f"Difference, {DIFFERENCE_GAIN} times as bright", type="filepath", format="png", height=260,
                    interactive=False, buttons=["download"], elem_id="difference", elem_classes=["tiny-pictures"],
                )  # fmt: skip
        with gr.Accordion("All pictures on one sheet: one row per method, one column per seed", open=False):
            self.sheet = gr.Image(
                label="Sheet", type="filepath", format="png", interactive=False, buttons=["download", "fullscreen"],
                elem_id="sheet",
            )  # fmt: skip
        self.shown = gr.State([])
        self._wire()

    def _wire(self) -> None:
        outputs = [
            self.status, self.table, self.against, self.slider, self.side, self.apart, self.sheet, self.shown,
        ]  # fmt: skip
        started_and_stopped(
            [self.start.click],
            self.wrap(self.draw),
            [self.methods, *self.form.inputs],
            outputs,
            self.start,
            self.stop,
            self.status,
        )
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        self.against.input(self._choose, [self.against, self.shown], [self.slider, self.apart], **quiet)
        self.add.click(self._add, [self.methods, *self.form.inputs], [self.methods, self.status], **quiet)
        self.form.model.change(self._model_changed, [self.form.model, self.methods], [self.methods], **quiet)

    @property
    def kept(self) -> dict[Any, Check]:
        """Fields that the browser keeps."""
        return {self.methods: usable_methods}

    def draw(self, methods: list[str], *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Draw and compare."""
        try:
            uses = [parse_use(typed) for typed in methods or []]
            if len(uses) > MAX_METHODS:
                raise UserError(f"at most {MAX_METHODS} methods are compared at once, got {len(uses)}")
            settings = self.engine.check(self.form.settings(*values).with_use(Use()))
        except EXPECTED as error:
            yield {self.status: f"Not done: {message_of(error)}"}
            raise as_gradio_error(error) from error
        yield {self.slider: None, self.apart: None, self.side: None, self.sheet: None, self.table: None}

        def show(progress: Progress) -> dict[Any, Any]:
            return {}

        yield from follow(self.engine.compare(settings, uses, previews=False), self.status, show, self._finish)

    def _finish(self, found: Comparison) -> dict[Any, Any]:
        files = [save(row.result, self.folder).files for row in found.rows]
        shown = []
        for i, row in enumerate(found.rows):
            shown.append((row.label, self._large(row.result.pictures[0]), self._large(found.difference(i))))
        sheet = self._write("sheet", comparison_sheet(found))
        settings = found.rows[0].result.settings
        last = len(shown) - 1
        return {
            self.status: f"Done: {settings.prompt}, seed {settings.seed}, steps: {settings.steps}."
            " The warm-up is not timed.",
            self.table: found.table(),
            self.against: gr.update(choices=[(row.label, i) for i, row in enumerate(found.rows)], value=last),
            self.slider: (shown[0][1], shown[last][1]),
            self.side: [(str(made[0]), row.label) for made, row in zip(files, found.rows, strict=True)],
            self.apart: shown[last][2],
            self.sheet: str(sheet),
            self.shown: shown,
        }

    def _large(self, picture: Any) -> str:
        """A file with the picture, large enough for the slider, which smooths what it enlarges."""
        return str(self._write("shown", enlarge(picture, max(1, SHOWN_SIZE * 2 // max(picture.size)))))

    def _write(self, stem: str, picture: Any) -> Path:
        path = self.folder / f"{stem}-{secrets.token_hex(6)}.png"
        save_png(picture, path, {"program": "attngen", "prompt": stem})
        return path

    def _choose(self, row: int, shown: list[Any]) -> tuple[Any, Any]:
        if not shown:
            return None, None
        return (shown[0][1], shown[row][1]), shown[row][2]

    def _add(self, methods: list[str], *values: Any) -> dict[Any, Any]:
        try:
            use = self.form.settings(*values).use.checked()
            if use.method == "plan":
                raise UserError("a plan is too long for this list; draw with it on Generate")
        except EXPECTED as error:
            raise as_gradio_error(error) from error
        return {self.methods: list(dict.fromkeys([*(methods or []), use.text])), self.status: f"Added {use.label}."}

    def _model_changed(self, name: str, methods: list[str]) -> Any:
        try:
            model = self.engine.models.get(name or "")
        except EXPECTED:
            return gr.update()  # the form says what is wrong
        found = suggestions(model)
        usable = usable_methods(methods, model)
        return gr.update(choices=found, value=usable if len(usable) > 1 else found[:3])


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
    """Methods worth comparing on a model, as texts."""
    found = ["none"]
    if MEDIATORS not in model.refused:
        found += [f"{MEDIATORS} 4", f"{MEDIATORS} 1:4,0.5:16,0.2:25", f"{MEDIATORS} 25"]
    if "agent" not in model.refused:
        small = max(model.size or (512, 512)) <= 64
        rest = " min_tokens=0" if small else ""
        others = [name for name in model.methods if name != "agent" and METHODS[name].is_usual]
        found += [f"agent 64{rest}", *others[:1], f"agent 16{rest}", *others[1:], "softmax"]
    return found


def comparison_sheet(found: Comparison) -> Any:
    """One labelled picture: a row a method, a column a seed."""
    first = found.rows[0].result
    scale = max(1, 128 // max(first.pictures[0].size))
    seeds = [(f"seed {(first.settings.seed or 0) + k}", 1) for k in range(len(first.pictures))]
    labels = [f"{row.label}, {row.result.seconds:.1f} s" for row in found.rows]
    return grid([row.result.pictures for row in found.rows], row_labels=labels, groups=seeds, scale=scale)
