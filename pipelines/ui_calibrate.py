"""The tab that measures a model's layers on the form's own prompt and chooses a plan of methods."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.engine.models import Model
from pipelines.engine.results import Progress
from pipelines.engine.session import Engine
from pipelines.methods.options import PLAN
from pipelines.methods.uses import Use
from pipelines.ui_events import EXPECTED, Wrap, as_gradio_error, follow, message_of, started_and_stopped
from pipelines.ui_form import Form
from pipelines.ui_remember import Check, one_of_its_own, within

BY_ERROR, BY_SPEED = "largest error", "speed-up"


class CalibrateTab:
    """Finds a plan for what the form of the Generate tab says.

    Args:
        engine: that measures.
        folder: where plans are written.
        form: that says what to draw, and takes the plan.
        wrap: put around what draws.
    """

    def __init__(self, engine: Engine, folder: Path, form: Form, wrap: Wrap) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, form, wrap
        gr.Markdown(
            "Measures, layer by layer and stage by stage, what each cheaper attention changes and saves on the prompt, "
            "size and steps of the Generate tab, and chooses the best plan within your bound. It takes minutes."
        )
        self.fits = gr.Textbox(_verdict(form.first), label="This model", interactive=False, elem_id="calibrate-model")
        with gr.Row():
            self.kind = gr.Radio([BY_ERROR, BY_SPEED], value=BY_ERROR, label="What is bounded", elem_id="bound-kind")
            self.bound = gr.Number(
                0.05, label="Bound", info="error: relative to the exact result; speed-up: times, of attention",
                minimum=0.0001, maximum=1000, elem_id="bound",
            )  # fmt: skip
            self.stages = gr.Slider(
                1, 8, value=3, step=1, label="Stages", info="from noise to picture", elem_id="stages"
            )
        with gr.Row():
            self.start = gr.Button(
                "Calibrate  (Ctrl+Enter)", variant="primary", elem_id="calibrate", elem_classes=["start-button"]
            )
            self.stop = gr.Button(
                "Stop  (Esc)", variant="stop", interactive=False, elem_id="calibrate-stop", elem_classes=["stop-button"]
            )
        self.status = gr.Textbox("Ready.", label="Status", interactive=False, max_lines=4, elem_id="calibrate-status")
        with gr.Row():
            self.map = gr.Image(
                label="Error by layer and time", type="filepath", format="png", interactive=False,
                buttons=["download", "fullscreen"], elem_id="heat-map",
            )  # fmt: skip
            with gr.Column():
                self.text = gr.Textbox(label="Plan", lines=10, max_lines=16, interactive=False, elem_id="plan-text")
                self.file = gr.File(label="Plan file", interactive=False, height=90, elem_id="plan-file")
                self.use = gr.Button("Draw with this plan", interactive=False, elem_id="use-plan")
        self._wire()

    @property
    def kept(self) -> dict[Any, Check]:
        """Fields that the browser keeps."""
        return {self.kind: one_of_its_own(self.kind), self.bound: within(self.bound), self.stages: within(self.stages)}

    def _wire(self) -> None:
        started_and_stopped(
            [self.start.click],
            self.wrap(self.run),
            [self.kind, self.bound, self.stages, *self.form.inputs],
            [self.status, self.map, self.text, self.file, self.use],
            self.start,
            self.stop,
            self.status,
        )
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        form = self.form
        self.use.click(
            self._use, [self.text], [form.method, form.option_parts[PLAN, PLAN], *form.groups.values(), form.timeline,
            self.status], **quiet,
        )  # fmt: skip
        form.model.change(self._model_changed, [form.model], [self.fits], **quiet)

    def run(self, kind: str, bound: float, stages: int, *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Calibrate."""
        try:
            settings = self.engine.check(self.form.settings(*values).with_use(Use()))
            wanted = {"max_error": bound} if kind == BY_ERROR else {"speedup": bound}
        except EXPECTED as error:
            yield {self.status: f"Not done: {message_of(error)}"}
            raise as_gradio_error(error) from error

        def show(progress: Progress) -> dict[Any, Any]:
            return {}

        events = self.engine.calibrate(settings, **wanted, num_stages=stages)
        yield from follow(events, self.status, show, self._finish)

    def _finish(self, plan: Any) -> dict[Any, Any]:
        stem = self.folder / f"plan-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        plan.save(stem.with_suffix(".json"))
        picture: str | None = str(stem.with_suffix(".png"))
        told = f"Done: {outcome(plan)}. The plan is saved; draw with it, or pass the file to attngen.apply."
        try:
            plan.measurements.plot(picture)
        except ImportError as error:
            picture, told = None, f"{told} No heat map: {message_of(error)}"
        return {
            self.status: told,
            self.map: picture,
            self.text: plan.to_json(),
            self.file: str(stem.with_suffix(".json")),
            self.use: gr.update(interactive=True),
        }

    def _use(self, text: str) -> dict[Any, Any]:
        try:
            updates = self.form.method_values(Use(PLAN, {PLAN: text}).checked())
        except EXPECTED as error:
            raise as_gradio_error(error) from error
        return {**updates, self.status: "The plan is chosen on the Generate tab."}

    def _model_changed(self, name: str) -> str:
        try:
            return _verdict(self.engine.models.get(name or ""))
        except EXPECTED as error:
            return message_of(error)


def outcome(plan: Any) -> str:
    """What a calibrated plan does, in a few words."""
    found = plan.measurements
    methods = {method.kind for stage in plan.stages for method in stage.layers.values()}
    if methods <= {"softmax"}:
        return "nothing cheaper was found within that bound, so attention stays exact"
    return f"error {found.error:.3g} of the result, attention {found.speedup:.2f} times faster"


def _verdict(model: Model) -> str:
    if PLAN in model.refused:
        return f"{model.name} cannot be calibrated; choose another model on Generate. {model.refused[PLAN]}"
    return f"{model.name} can be calibrated."
