"""The tab that measures a model's layers on the form's own prompt and chooses a plan of methods."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.engine.models import Model
from pipelines.engine.session import Engine
from pipelines.engine.settings import whole
from pipelines.engine.shipped import shipped_models
from pipelines.methods.options import PLAN
from pipelines.methods.uses import Use
from pipelines.ui_events import EXPECTED, QUIET, Buttons, Wrap, as_gradio_error, bounded, follow, refused, stop_of
from pipelines.ui_form import Form
from pipelines.ui_generate import HEAT_MAP, START_DRAWING, GenerateTab
from pipelines.ui_remember import Check, is_number, one_of_its_own

BY_ERROR, BY_SPEED = "largest error", "times faster"
OTHER = "emoji-unet"  # the model that ships and can be calibrated
MAX_BOUND, MAX_STAGES = 1000.0, 8


class CalibrateTab:
    """Finds a plan for what the form of the Generate tab holds.

    Args:
        engine: that measures.
        folder: where plans are written.
        form: that sets what to draw, and takes the plan.
        wrap: put around what draws.
    """

    def __init__(self, engine: Engine, folder: Path, form: Form, wrap: Wrap) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, form, wrap
        gr.Markdown(
            "Measures, layer by layer and stage by stage, what each cheaper attention changes and saves on the prompt, "
            "size, steps and seed of the Generate tab, and chooses the fastest plan within your bound, timed on whole "
            "images. It takes minutes."
        )
        usable = PLAN not in form.first.refused
        self.fits = gr.Textbox(
            _verdict(form.first), label="This model", interactive=False, elem_id="calibrate-model",
            elem_classes=["line"],
        )  # fmt: skip
        self.other = gr.Button(f"Load {OTHER}, which can be", size="sm", visible=not usable, elem_id="load-other")
        with gr.Row():
            self.kind = gr.Radio([BY_ERROR, BY_SPEED], value=BY_ERROR, label="What is bounded", elem_id="bound-kind")
            self.bound = gr.Number(
                0.05, label="Bound", info="error: relative to the exact result; times faster: of the whole image",
                elem_id="bound",
            )  # fmt: skip
            self.stages = gr.Number(3, label="Stages", info="from noise to image, 1 to 8", elem_id="stages")
        with gr.Row():
            start = gr.Button("Calibrate", variant="primary", elem_id="calibrate", elem_classes=["start-button"])
            stop = gr.Button("Stop", interactive=False, elem_id="calibrate-stop", elem_classes=["stop-button"])
        self.status = gr.Textbox(
            "Ready.", label="Status", interactive=False, max_lines=4, elem_id="calibrate-status", elem_classes=["line"]
        )
        self.buttons = Buttons(start, stop, self.status)
        self.map = gr.Image(
            label="Error by layer and time", show_label=False, type="filepath", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_id="heat-map",
        )  # fmt: skip
        self.use = gr.Button("Draw with this plan", interactive=False, elem_id="use-plan")
        with gr.Accordion("The plan", open=False):
            self.text = gr.Textbox(label="Plan", lines=10, max_lines=16, interactive=False, elem_id="plan-text")
            self.file = gr.File(label="Plan file", interactive=False, height=90, elem_id="plan-file")
        self.outputs = [self.status, self.map, self.text, self.file, self.use]
        form.followers.append(self._follow)
        form.followed.extend([self.fits, self.other, *self.outputs])

    @property
    def kept(self) -> dict[Any, Check]:
        """Fields that the browser keeps."""
        stages, bound = self.stages, self.bound
        return {
            self.kind: one_of_its_own(self.kind),
            bound: lambda value, model: is_number("Bound", value, 0.0001, MAX_BOUND),
            stages: lambda value, model: whole("Stages", value, 1, MAX_STAGES),
        }

    def wire(self, generate: GenerateTab) -> None:
        """Connect it; after the form's tab is wired."""
        form, inputs = self.form, [self.kind, self.bound, self.stages, *self.form.inputs]
        self.buttons.wire([self.buttons.start.click], self.wrap(self.run), inputs, self.outputs)
        generate.buttons.wire(
            [self.other.click], generate.choose_model, [gr.State(OTHER), form.fitted],
            [*form.model_outputs, generate.status],
        )  # fmt: skip
        self.use.click(self._use, [self.text], form.method_outputs, **QUIET).success(None, None, None, js=START_DRAWING)

    def run(self, key: str, kind: Any, bound: Any, stages: Any, *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Calibrate, and time the plan."""
        try:
            stages = whole("Stages", stages, 1, MAX_STAGES)
            bound = is_number("Bound", bound, 0.0001, MAX_BOUND)
            settings = self.engine.check(self.form.settings(*values, shown_seed=True).with_use(Use()))
        except EXPECTED as error:
            yield refused(error, self.status)
            return
        stop = stop_of(key)
        wanted = {"speedup": bound} if kind == BY_SPEED else {"max_error": bound}
        events = self.engine.calibrate(settings, **wanted, num_stages=stages, stop=stop)
        events = bounded(events, stop, self.engine.limits.seconds)
        yield from follow(events, self.status, lambda progress: {}, self._finish)

    def _finish(self, plan: Any) -> dict[Any, Any]:
        stem = self.folder / f"{HEAT_MAP}{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        plan.save(stem.with_suffix(".json"))
        picture: str | None = str(stem.with_suffix(".png"))
        told = (
            f"Done: {plan.measurements.summary()}. The plan is saved; draw with it, or pass the file to attngen.apply."
        )
        try:
            plan.measurements.plot(picture)
        except ImportError as error:
            picture, told = None, f"{told} No heat map: {error}"
        return {
            self.status: told,
            self.map: picture,
            self.text: plan.to_json(),
            self.file: str(stem.with_suffix(".json")),
            self.use: gr.update(interactive=True),
        }

    def _use(self, text: str) -> dict[Any, Any]:
        try:
            return self.form.method_values(Use(PLAN, {PLAN: text}).checked())
        except EXPECTED as error:
            raise as_gradio_error(error) from error

    def _follow(self, model: Model) -> dict[Any, Any]:
        """Of another model nothing stays."""
        usable = PLAN not in model.refused
        return {
            self.fits: _verdict(model),
            self.other: gr.update(visible=not usable and OTHER in shipped_models()),
            self.status: "Ready.",
            self.map: None,
            self.text: "",
            self.file: None,
            self.use: gr.update(interactive=False),
        }


def _verdict(model: Model) -> str:
    if PLAN in model.refused:
        return f"{model.name} cannot be calibrated: {model.refused[PLAN]}."
    return f"{model.name} can be calibrated."
