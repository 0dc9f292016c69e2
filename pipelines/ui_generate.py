"""The tab that draws: the form on the left, what was drawn on the right."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.recall import recall
from pipelines.engine.results import Progress, Result, save
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.images import read_settings
from pipelines.methods.options import MEDIATORS
from pipelines.ui_code import code_of
from pipelines.ui_events import (
    EXPECTED,
    NOT_DONE,
    QUIET,
    STOPPED,
    Buttons,
    Wrap,
    bounded,
    escaped,
    follow,
    merged,
    refused,
    stop_of,
)
from pipelines.ui_form import Form
from pipelines.ui_hero import settings_of
from pipelines.ui_shown import title_of

MAX_HISTORY, MAX_VISITORS, MAX_FRAMES, MAX_KEPT_FRAMES = 60, 1000, 8, 64
FILLED = "The settings are filled in"  # how the status begins then
HEAT_MAP = "plan-"  # how the names of files of Calibrate begin
START_DRAWING = """() => {
  [...document.querySelectorAll("button[role=tab]")].find((tab) => tab.innerText.trim() === "Generate")?.click();
  document.querySelector("#generate").click();
}"""
EXAMPLE_PROMPTS = ("a lighthouse in a storm, oil painting", "a fox in the snow, photograph", "an old map of an island")
EXAMPLE_MEDIATORS = ("16", "1:4,0.5:16,0.2:25", "4", "1:9,0.3:25", "25")


class GenerateTab:
    """Draws what the form holds, shows it coming, and keeps earlier pictures in view.

    Args:
        engine: that draws.
        folder: where pictures are written.
        wrap: put around what draws.
        private: whether all visitors are one person, who may see all pictures of the folder.
    """

    def __init__(self, engine: Engine, folder: Path, wrap: Wrap, private: bool = True) -> None:
        self.engine, self.folder, self.form, self.wrap = engine, folder, Form(engine), wrap
        self.history_of = History(folder, private)
        form = self.form
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=320, elem_id="left"):
                with gr.Column(elem_id="choice"):
                    form.make_choice()
                    form.make_presets()
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Generate", variant="primary", elem_id="generate", elem_classes=["start-button"])
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", elem_classes=["stop-button"])
                with gr.Column(elem_id="more"):
                    with gr.Accordion("Attention", open=True):
                        form.make_method()
                    with gr.Accordion("Size, steps, seed and more", open=False, elem_id="details"):
                        form.make_details()
                    self.dropped = gr.UploadButton(
                        "Recall a picture: choose or drop a PNG", file_types=[".png"], size="sm", elem_id="recall"
                    )
                    self._make_examples()
            with gr.Column(scale=6, min_width=320, elem_id="right"), gr.Column(elem_id="output"):
                self._make_output()
        self.buttons = Buttons(start, stop, self.status)

    def _make_output(self) -> None:
        self.status = gr.Textbox(
            "Ready.", label="Status", lines=1, max_lines=4, interactive=False, elem_id="status", elem_classes=["line"]
        )
        self.gallery = gr.Gallery(
            label="Pictures", format="png", columns=1, height="auto", object_fit="contain", fit_columns=False,
            buttons=["download", "download_all", "fullscreen"], interactive=False, elem_id="gallery",
            elem_classes=["tiny-pictures"],
        )  # fmt: skip
        self.cost = gr.Textbox(
            label="Time and memory", lines=2, interactive=False, elem_id="cost", placeholder="after the first picture",
            elem_classes=["line"],
        )  # fmt: skip
        with gr.Accordion("From noise to image", open=False, visible=False, elem_id="steps-part") as self.way:
            self.frames = gr.Gallery(
                label="After these steps", format="png", columns=4, height="auto", object_fit="contain",
                fit_columns=False, interactive=False, buttons=[], elem_id="frames", elem_classes=["tiny-pictures"],
            )  # fmt: skip
        with gr.Accordion("The same in Python", open=False, visible=False, elem_id="code-part") as self.same:
            self.code = gr.Code(label="These lines draw it", language="python", interactive=False, elem_id="code")
        with gr.Accordion("Layer by layer", open=False, visible=False) as self.layers:
            self.report = gr.Code(label="What the method did to each layer", interactive=False, language=None, lines=4)
        with gr.Accordion("Earlier pictures", open=False, elem_id="past"):
            self.history = gr.Gallery(
                label=f"Earlier pictures, in the folder {self.folder.name}", columns=6, height="auto",
                fit_columns=False, object_fit="contain", buttons=["download"], interactive=False, allow_preview=False,
                elem_id="history", elem_classes=["tiny-pictures"],
            )  # fmt: skip
            self.picked = gr.Textbox(
                label="Chosen", interactive=False, placeholder="choose one above", elem_id="picked",
                elem_classes=["line"],
            )  # fmt: skip
            self.again = gr.Button("Use these settings", size="sm", interactive=False, elem_id="again")
        self.chosen = gr.State("")

    def _make_examples(self) -> None:
        form, model = self.form, self.form.first
        if model.kind == CLASSES and MEDIATORS in model.methods:
            names = [model.label_text(number) for number in sorted(model.labels)]
            rows = [[name, MEDIATORS, mediators] for name, mediators in zip(names, EXAMPLE_MEDIATORS, strict=False)]
            parts = [form.label, form.method, form.option_parts[MEDIATORS, MEDIATORS]]
        elif model.kind == CLASSES:
            return
        else:
            rows, parts = [[prompt] for prompt in EXAMPLE_PROMPTS], [form.prompt]
        shown = gr.Examples(rows, parts, label="Examples", elem_id="examples", examples_per_page=6, api_name=None)
        # Other models have other classes and methods.
        form.followers.append(lambda other: {shown.dataset: gr.update(visible=other.name == model.name)})
        form.followed.append(shown.dataset)

    @property
    def outputs(self) -> list[Any]:
        """Components that drawing sets."""
        return [
            self.status, self.gallery, self.cost, self.way, self.frames, self.same, self.code, self.layers,
            self.report, self.history, self.form.seed,
        ]  # fmt: skip

    def wire(self, page: gr.Blocks, hero: gr.HTML | None = None) -> None:
        """Connect everything; after all tabs are made, for those that follow the form are set with it.

        Args:
            page: the page.
            hero: the top of the page, whose `submit` asks for a drawing.
        """
        form = self.form
        form.wire()
        triggers = [self.buttons.start.click, form.prompt.submit]
        self.buttons.wire(triggers, self.wrap(self.draw), [form.keep_settings, *form.inputs], self.outputs)
        self.buttons.wire(
            [form.model.input], self.choose_model, [form.model, form.fitted], [*form.model_outputs, self.status]
        )
        quiet = {**QUIET, "queue": True}  # for a message in the corner, which Gradio sends through its queue
        page.load(self._past, None, [self.history], **QUIET)
        self.history.select(self._pick, None, [self.picked, self.again, self.chosen], **QUIET)
        # A recalled picture is drawn by the same chain, which the button starts once the form is filled.
        outputs = list(dict.fromkeys([*form.model_outputs, *form.outputs, self.status]))
        fills = [
            self.dropped.upload(self.fill, [self.dropped], outputs, **quiet),
            self.again.click(self.fill, [self.chosen], outputs, **quiet),
        ]
        if hero is not None:
            fills.append(hero.submit(self._fill_live, None, outputs, **quiet))
        for filled in fills:
            filled.then(None, [self.status], None, js=f"(line) => line.startsWith('{FILLED}') && ({START_DRAWING})()")

    def choose_model(self, key: str, name: str, fitted: str) -> Generator[dict[Any, Any], None, None]:
        """Load a model and fit the form to it; where it cannot be, the form stays as it is."""
        form, before = self.form, gr.update(value=fitted)

        def finish(model: Model) -> dict[Any, Any]:
            return {**form.model_values(model), self.status: f"Ready: {model.name} is loaded."}

        loading = self.engine.load(name if isinstance(name, str) else "", stop_of(key))
        stopped = "Stopped waiting. The model goes on loading in the background."
        for update in follow(loading, self.status, lambda progress: {}, finish, stopped):
            if str(update.get(self.status)).startswith((stopped, NOT_DONE)):
                update[form.model] = before
            yield update

    def draw(self, key: str, keep_settings: bool, *values: Any) -> Generator[dict[Any, Any], None, None]:
        """Draw what the form holds."""
        try:
            settings = self.engine.check(self.form.settings(*values))
        except EXPECTED as error:
            yield refused(error, self.status)
            return
        hidden = gr.update(visible=False)
        yield {
            **{self.gallery: None, self.cost: "", self.form.seed: settings.seed},
            **{self.way: hidden, self.same: hidden, self.layers: hidden},
        }
        frames: list[tuple[Any, str]] = []

        def show(progress: Progress) -> dict[Any, Any]:
            if progress.preview is None:
                return {}
            if progress.picture == 1:
                frames.append((progress.preview, f"step {progress.done}"))
                if len(frames) > MAX_KEPT_FRAMES:
                    del frames[1::2]
            return {self.gallery: gr.update(value=[(progress.preview, "being drawn")], columns=1, selected_index=None)}

        def finish(result: Result) -> dict[Any, Any]:
            done = save(result, self.folder, bool(keep_settings))
            self.history_of.add(key, done.files)
            used, model = done.settings, self.engine.models.get(done.settings.model)
            seeds = [f"seed {(used.seed or 0) + k}" for k in range(len(done.files))]
            shown = [(str(file), seed) for file, seed in zip(done.files, seeds, strict=True)]
            return {
                self.status: f"Done: {used.prompt}, seed {used.seed}, {used.width} x {used.height},"
                f" steps: {used.steps}, {title_of(model, used.use)}.",
                self.gallery: gr.update(value=shown, selected_index=None, columns=columns_for(len(shown))),
                self.cost: done.summary(),
                self.way: gr.update(visible=len(frames) > 1),
                self.frames: frames[:: -(-len(frames) // MAX_FRAMES) or 1],
                self.same: gr.update(visible=True),
                self.code: code_of(model, used),
                self.report: "" if done.report is None else str(done.report),
                self.layers: gr.update(visible=done.report is not None),
                self.history: self.history_of.shown(key),
            }

        stop = stop_of(key)
        events = bounded(self.engine.generate(settings, stop=stop), stop, self.engine.limits.seconds)
        for update in follow(events, self.status, show, finish):
            if str(update.get(self.status, "")) == STOPPED:
                update[self.gallery] = None
            yield update

    # Earlier pictures

    def _past(self, request: gr.Request) -> Any:
        return self.history_of.shown(str(request.session_hash))

    def _pick(self, picked: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        # By name: other pages may have drawn since this one was filled.
        image = picked.value.get("image", {}) if isinstance(picked.value, dict) else {}
        name = Path(str(image.get("orig_name") or image.get("path"))).name
        files = {file.name: file for file in self.history_of.files(str(request.session_hash))}
        if name not in files:
            return {self.picked: "This picture is no longer there.", self.again: gr.update(interactive=False)}
        file = files[name]
        told = caption_of(file)
        return {self.picked: told or "It has no settings.", self.again: gr.update(interactive=bool(told)),
                self.chosen: str(file)}  # fmt: skip

    def _fill_live(self, asked: gr.EventData) -> dict[Any, Any]:
        try:
            settings = Settings(**settings_of(asked)).checked(self.engine.limits)
            return {**self._filled(settings), self.status: f"{FILLED}."}
        except EXPECTED as error:
            return refused(error, self.status)

    def _filled(self, settings: Settings) -> dict[Any, Any]:
        updates: dict[Any, Any] = self.form.model_values(self.engine.models.get(settings.model))
        for part, value in self.form.values_of(settings).items():
            updates[part] = merged(updates.get(part), value)
        return updates

    def fill(self, path: str | None) -> dict[Any, Any]:
        """Fill the form from a picture's settings; for a model that is not here it stays as it is."""
        try:
            if not path:
                raise UserError("choose or drop a PNG file")
            found = recall(path, self.engine.models, self.engine.limits)
            if found.missing is not None:
                raise UserError(
                    f"the picture was drawn with the model {found.missing!r}, which is not loaded here: choose it"
                    " first, then recall the picture again"
                )
            updates = self._filled(found.settings)
        except EXPECTED as error:
            return refused(error, self.status)
        told = " ".join(f"{note}." for note in found.notes)
        if told:
            gr.Warning(escaped(told), duration=20)
        return {**updates, self.status: f"{FILLED}. {told}".strip()}


class History:
    """Earlier pictures, newest first: those of the folder, or those of each visitor alone.

    Args:
        folder: with the pictures.
        private: whether all visitors may see all of the folder.
    """

    def __init__(self, folder: Path, private: bool) -> None:
        self.folder, self.private = folder, private
        self._own: OrderedDict[str, list[Path]] = OrderedDict()

    def add(self, key: str, files: list[Path]) -> None:
        """Files that a visitor made; of those who came longest ago nothing is kept."""
        visitor = key.split(" ")[0]
        self._own[visitor] = [*files, *self._own.pop(visitor, [])][:MAX_HISTORY]
        if len(self._own) > MAX_VISITORS:
            self._own.popitem(last=False)

    def files(self, key: str) -> list[Path]:
        """At most `MAX_HISTORY` files."""
        if not self.private:
            return self._own.get(key.split(" ")[0], [])
        own = (file for file in self.folder.glob("*.png") if not file.name.startswith(HEAT_MAP))
        found = [(file.stat().st_mtime, file) for file in own]
        return [file for _, file in sorted(found, reverse=True)[:MAX_HISTORY]]

    def shown(self, key: str) -> list[tuple[str, str]]:
        """(file, caption) for a gallery."""
        return [(str(file), caption_of(file)) for file in self.files(key)]


def caption_of(file: Path) -> str:
    """Prompt, seed and method of a picture; empty where it has none."""
    try:
        data = read_settings(file)
    except ValueError:
        return ""
    told = [str(data.get("prompt", ""))[:60], f"seed {data.get('seed')}", str(data.get("size", ""))]
    told += [f"{data['method']} {data.get('mediators', '')}".strip()] if data.get("method", "none") != "none" else []
    return ", ".join(part for part in told if part)


def columns_for(pictures: int) -> int:
    """Columns that keep so many pictures in view: one for one, four for sixteen."""
    return min(4, max(1, math.ceil(pictures**0.5)))
