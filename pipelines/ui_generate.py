"""The tab that draws: the form on the left, what was drawn on the right."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES
from pipelines.engine.recall import recall
from pipelines.engine.results import Progress, Result, save
from pipelines.engine.session import Engine
from pipelines.methods.options import MEDIATORS
from pipelines.ui_events import EXPECTED, Wrap, as_gradio_error, follow, merged, message_of, started_and_stopped
from pipelines.ui_form import Form

MAX_HISTORY = 60
EXAMPLE_PROMPTS = ("a lighthouse in a storm, oil painting", "a fox in the snow, photograph", "an old map of an island")
EXAMPLE_MEDIATORS = ("16", "1:4,0.5:16,0.2:25", "4", "1:9,0.3:25", "25")


class GenerateTab:
    """Draws what the form says, shows it coming, and keeps the session's pictures in view.

    Args:
        engine: that draws.
        folder: where pictures are written.
        wrap: put around what draws.
    """

    def __init__(self, engine: Engine, folder: Path, wrap: Wrap) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, Form(engine), wrap
        form = self.form
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=320, elem_id="left"):
                with gr.Column(elem_id="choice"):
                    form.make_choice()
                    form.make_presets()
                with gr.Row(elem_id="buttons"):
                    self.start = gr.Button(
                        "Generate  (Ctrl+Enter)", variant="primary", elem_id="generate", elem_classes=["start-button"]
                    )
                    self.stop = gr.Button(
                        "Stop  (Esc)", variant="stop", interactive=False, elem_id="stop", elem_classes=["stop-button"]
                    )
                with gr.Column(elem_id="more"):
                    with gr.Accordion("Attention", open=True):
                        form.make_method()
                    with gr.Accordion("Size, steps, seed and more", open=False, elem_id="details"):
                        form.make_details()
                    with gr.Accordion("Recall a picture", open=False, elem_id="recall-part"):
                        self.dropped = gr.File(
                            label="Drop a PNG made here: its settings come back, and the picture is drawn again",
                            file_types=[".png"],
                            height=120,
                            elem_id="recall",
                        )
                    self._make_examples()
            with gr.Column(scale=6, min_width=320, elem_id="right"), gr.Column(elem_id="output"):
                self._make_output()
        self._wire()

    def _make_output(self) -> None:
        self.status = gr.Textbox("Ready.", label="Status", lines=1, max_lines=4, interactive=False, elem_id="status")
        self.preview = gr.Image(
            label="What is being drawn", format="png", interactive=False, height=300, visible=False, buttons=[],
            elem_id="preview", elem_classes=["tiny-pictures"],
        )  # fmt: skip
        self.gallery = gr.Gallery(
            label="Pictures",
            format="png",
            columns=2,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="gallery",
            elem_classes=["tiny-pictures"],
        )
        self.cost = gr.Textbox(
            label="Time and memory", lines=2, interactive=False, elem_id="cost", placeholder="after the first picture"
        )
        self.files = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="files")
        with gr.Accordion("Layer by layer", open=False):
            self.report = gr.Code(label="What the method did to each layer", interactive=False, language=None, lines=4)
        with gr.Accordion("Earlier pictures", open=False):
            self.history = gr.Gallery(
                label=f"Earlier pictures, in {self.folder}",
                columns=6,
                height="auto",
                fit_columns=False,
                object_fit="contain",
                buttons=["download"],
                interactive=False,
                elem_id="history",
                elem_classes=["tiny-pictures"],
            )
        self.past = gr.State([])

    def _make_examples(self) -> None:
        form, model = self.form, self.form.first
        if model.kind == CLASSES and MEDIATORS in model.methods:
            names = [model.label_text(number) for number in sorted(model.labels)]
            rows = [[name, MEDIATORS, mediators] for name, mediators in zip(names, EXAMPLE_MEDIATORS, strict=False)]
            parts = [form.label, form.method, form.option_parts[MEDIATORS, MEDIATORS]]
        elif model.kind == CLASSES:
            rows, parts = [], []
        else:
            rows, parts = [[prompt] for prompt in EXAMPLE_PROMPTS], [form.prompt]
        if rows:
            shown = gr.Examples(rows, parts, label="Examples", elem_id="examples", examples_per_page=6, api_name=None)
            form.model.change(
                lambda name: gr.update(visible=name == model.name),  # other models have other classes and methods
                [form.model],
                [shown.dataset],
                show_progress="hidden",
                api_visibility="private",
            )

    @property
    def outputs(self) -> list[Any]:
        """Components that drawing sets."""
        return [
            self.status, self.preview, self.gallery, self.cost, self.files, self.report, self.history, self.past,
            self.form.seed,
        ]  # fmt: skip

    def _wire(self) -> None:
        form = self.form
        form.wire()
        triggers = [self.start.click, form.prompt.submit]
        inputs = [form.keep_settings, self.past, *form.inputs]
        ended = started_and_stopped(
            triggers, self.wrap(self.draw), inputs, self.outputs, self.start, self.stop, self.status
        )
        ended.then(
            self._hide_preview, None, [self.preview], queue=False, show_progress="hidden", api_visibility="private"
        )
        self.stop.click(
            self._hide_preview, None, [self.preview], queue=False, show_progress="hidden", api_visibility="private"
        )
        # A recalled picture is drawn by the same chain, which a hidden button starts once the form is filled.
        filled = self.dropped.upload(
            self.fill, [self.dropped], self._fill_outputs,
            show_progress_on=[self.status], api_visibility="private",
        )  # fmt: skip
        filled.success(None, None, None, js="() => document.querySelector('#generate').click()")

    @property
    def _fill_outputs(self) -> list[Any]:
        form = self.form
        parts = [form.model, *form.model_outputs, *form.outputs, self.dropped, self.status]
        return list(dict.fromkeys(parts))

    def draw(self, keep_settings: bool, past: list[str], *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Draw what the form says."""
        try:
            settings = self.engine.check(self.form.settings(*values))
        except EXPECTED as error:
            yield {self.status: f"Not done: {message_of(error)}"}
            raise as_gradio_error(error) from error
        yield {self.gallery: None, self.files: None, self.cost: "", self.report: "", self.form.seed: settings.seed}

        def show(progress: Progress) -> dict[Any, Any]:
            if progress.preview is None:
                return {}
            return {self.preview: gr.update(value=progress.preview, visible=True)}

        def finish(result: Result) -> dict[Any, Any]:
            done = save(result, self.folder, keep_settings)
            files = [str(file) for file in done.files]
            seeds = [f"seed {(done.settings.seed or 0) + k}" for k in range(len(files))]
            kept = [*files, *past][:MAX_HISTORY]
            return {
                self.status: f"Done: {done.settings.prompt}, seed {done.settings.seed}, {done.settings.width} x"
                f" {done.settings.height}, steps: {done.settings.steps}, {done.settings.use.label}.",
                self.gallery: gr.update(
                    value=list(zip(files, seeds, strict=True)), selected_index=None, columns=columns_for(len(files))
                ),
                self.files: files,
                self.cost: done.summary(),
                self.report: "" if done.report is None else str(done.report),
                self.history: kept,
                self.past: kept,
                self.preview: gr.update(visible=False),
            }

        yield from follow(self.engine.generate(settings), self.status, show, finish)

    def fill(self, path: str | None) -> Generator[dict[Any, Any], None, None]:
        """Fill the form from a dropped picture, and be ready for the next one."""
        try:
            if path is None:
                raise UserError("drop a PNG file")
            found = recall(path, self.engine.models, self.engine.limits)
            model = self.engine.models.get(found.settings.model)
            updates = {self.form.model: model.name, **self.form.model_values(model)}
            for part, value in self.form.values_of(found.settings).items():
                updates[part] = merged(updates.get(part), value)
        except EXPECTED as error:
            yield {self.dropped: None, self.status: f"Not done: {message_of(error)}"}
            raise as_gradio_error(error) from error
        for note in found.notes:
            gr.Warning(_escaped(note), duration=20)
        told = " ".join(f"{note}." for note in found.notes)
        yield {**updates, self.dropped: None, self.status: f"The settings are back. {told}".strip()}

    def _hide_preview(self) -> Any:
        return gr.update(visible=False)


def columns_for(pictures: int) -> int:
    """Columns that keep so many pictures in view: two for up to four of them, four for sixteen."""
    return min(4, max(2, math.ceil(pictures**0.5)))


def _escaped(text: str) -> str:
    import html

    return html.escape(text, quote=False)
