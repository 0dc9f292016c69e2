"""The form that sets what to draw; all tabs read it."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.label_pictures import label_pictures
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import PLAN, UNCHANGED, Option, plain
from pipelines.methods.uses import Use, timeline
from pipelines.samplers import sampler_name
from pipelines.ui_events import EXPECTED, QUIET, as_gradio_error, message_of
from pipelines.ui_shown import (
    ASPECTS,
    OWN_SAMPLER,
    PRESETS,
    SCALES,
    about,
    fitting_size,
    label_names,
    method_choices,
    named_size,
    preset_values,
    sampler_choices,
    size_note,
    timeline_html,
)

LABELS = {"follow": "Switch by"}  # where the name of an option is no label
NEW_SEED = -1  # what other programs' users type for it
MAX_PLAN_BYTES = 1 << 20


class Form:
    """The components, the settings that they make, and what changes in them when the model does.

    Args:
        engine: whose models and limits are offered.

    Attributes:
        followers: model -> updates of components outside the form; they come with those of the form.
        followed: these components.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first = engine.models.get(engine.default_model)
        self.kinds = {self.first.name: self.first.kind}
        self.followers: list[Callable[[Model], dict[Any, Any]]] = []
        self.followed: list[Any] = []

    # Made in the order of the page

    def make_choice(self) -> None:
        """Model, prompt or class."""
        model, classes, free = self.first, self.first.kind == CLASSES, self.engine.models.allowed is None
        with gr.Row():
            self.model = gr.Dropdown(
                self.engine.models.names, value=model.name, label="Model", allow_custom_value=free, elem_id="model",
                info="or type a hub id, folder or file" if free else "Loaded when chosen",
            )  # fmt: skip
            self.label = gr.Dropdown(
                label_names(model), value=label_names(model)[0] if classes and model.labels else None, label="Class",
                info="Type to search", filterable=True, allow_custom_value=True, visible=classes, elem_id="label",
            )  # fmt: skip
        # The model that the other fields fit; while one is loaded, or if it cannot be, this is not the one typed.
        self.fitted = gr.State(model.name)
        pictures = label_pictures(model.labels)
        self.pictures = gr.Gallery(
            pictures, label="Classes: choose one by its picture", columns=7, height="auto", allow_preview=False,
            fit_columns=False, object_fit="contain", buttons=[], visible=bool(pictures),
            selected_index=0 if pictures else None, elem_id="labels", elem_classes=["tiny-pictures"],
        )  # fmt: skip
        self.prompt = gr.Textbox(
            label="Prompt", lines=2, max_length=self.engine.limits.characters, placeholder="what to draw",
            visible=not classes, elem_id="prompt",
        )  # fmt: skip

    def make_presets(self) -> None:
        """Presets of steps and guidance, and the number of pictures."""
        with gr.Row():
            self.preset = gr.Radio(list(PRESETS), value="Standard", label="Preset", elem_id="preset", scale=3)
            self.images = _number("Number of pictures", 1, "images", scale=1)

    def make_method(self) -> None:
        """Method, its options and their picture."""
        self.method = gr.Radio(method_choices(self.first), value=UNCHANGED, label="Attention method", elem_id="method")
        self.about = gr.Markdown(about(UNCHANGED), elem_id="about")
        self.option_parts: dict[tuple[str, str], Any] = {}
        self.groups: dict[str, gr.Group] = {}
        for info in METHODS.values():
            if not info.options:
                continue
            with gr.Group(visible=False, elem_id=f"options-{info.name}") as self.groups[info.name]:
                for option in info.options:
                    self.option_parts[info.name, option.name] = _option_part(info.name, option)
                if info.name == PLAN:
                    self.plan_file = gr.UploadButton("Read a plan file (.json)", file_types=[".json"], size="sm")
        self.timeline = gr.HTML("", elem_id="timeline", apply_default_css=False)

    def make_details(self) -> None:
        """Steps, guidance, size, seed, sampler and the rest."""
        model = self.first
        height, width = model.size or (512, 512)
        with gr.Row():
            self.steps = _number("Steps", min(model.steps, self.engine.limits.steps), "steps")
            self.guidance = _number("Guidance scale", model.guidance_scale, "guidance", info="1 = off", step=0.1)
        with gr.Row():
            self.aspect = gr.Dropdown(list(ASPECTS), value="Square", label="Aspect", elem_id="aspect")
            self.scale = gr.Dropdown(list(SCALES), value="trained size", label="Size", elem_id="scale")
        with gr.Row():
            self.width = _number("Width, px", width, "width")
            self.height = _number("Height, px", height, "height")
        self.size_note = gr.Markdown(size_note(model, width, height), elem_id="size-note")
        with gr.Row():
            self.seed = _number("Seed", 0, "seed", info="-1 = new; the next picture has the next seed")
            self.new_seed = gr.Checkbox(True, label="New seed each time", elem_id="new-seed")
        self.sampler = gr.Dropdown(
            sampler_choices(model), value=OWN_SAMPLER, label="Sampler", elem_id="sampler",
            info=f"Own: {sampler_name(model.pipe.scheduler)}",
        )  # fmt: skip
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, max_length=self.engine.limits.characters, visible=model.kind != CLASSES,
            elem_id="negative",
        )  # fmt: skip
        self.keep_settings = gr.Checkbox(
            True, label="Write the settings into the files", info="needed to recall a picture", elem_id="keep-settings"
        )
        self.remember = gr.Checkbox(
            True, label="Keep this form in the browser", elem_id="remember",
            info="it comes back when the page is opened again; untick to forget it",
        )  # fmt: skip

    # What it sets

    @property
    def inputs(self) -> list[Any]:
        """Components that `settings` reads, in its order."""
        return [
            self.model, self.label, self.prompt, self.negative, self.method, self.steps, self.guidance, self.width,
            self.height, self.seed, self.new_seed, self.images, self.sampler, *self.option_parts.values(),
        ]  # fmt: skip

    def settings(self, *values: Any, shown_seed: bool = False) -> Settings:
        """The settings, unchecked.

        Args:
            values: of `inputs`, as the browser sent them.
            shown_seed: whether the number in the field of the seed holds, whatever the box beside it says.

        Raises:
            UserError: for a field that is empty.
        """
        model, label, prompt, negative, method, steps, guidance, width, height, seed, new, images, sampler = values[:13]
        options = {
            name: value
            for (owner, name), value in zip(self.option_parts, values[13:], strict=True)
            if owner == method and value is not None
        }
        numbers = {self.steps: steps, self.guidance: guidance, self.width: width, self.height: height}
        for part, value in {**numbers, self.images: images}.items():
            if value in (None, ""):
                raise UserError(f"{part.label} is empty; type a number")
        classes = self.kind_of(model) == CLASSES
        return Settings(
            prompt=(label if classes else prompt) or "",
            negative_prompt="" if classes else negative or "",
            model=model or "",
            method=method,
            options=options,
            sampler=None if sampler == OWN_SAMPLER else sampler,
            steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            seed=None if (new and not shown_seed) or seed in (None, "", NEW_SEED) else seed,
            images=images,
        )

    def kind_of(self, name: Any) -> str:
        """Whether a model draws classes or texts; one that was never loaded is loaded now."""
        if name not in self.kinds:
            self.kinds[name] = self.engine.models.get(name if isinstance(name, str) else "").kind
        return self.kinds[name]

    @property
    def outputs(self) -> list[Any]:
        """Components that `values_of` sets."""
        return [*self.inputs, *self.method_outputs]

    @property
    def method_outputs(self) -> list[Any]:
        """Components that show a method."""
        return [self.method, self.about, self.timeline, *self.groups.values(), *self.option_parts.values()]

    def values_of(self, settings: Settings) -> dict[Any, Any]:
        """Updates that fill the form with these settings; the model's own updates come first."""
        model = self.engine.models.get(settings.model)
        height, width = model.size or (512, 512)
        updates: dict[Any, Any] = {
            self.label: settings.prompt if model.kind == CLASSES else gr.update(),
            self.prompt: gr.update() if model.kind == CLASSES else settings.prompt,
            self.negative: settings.negative_prompt,
            self.steps: settings.steps or model.steps,
            self.guidance: model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale,
            self.width: settings.width or width,
            self.height: settings.height or height,
            self.seed: settings.seed,
            self.new_seed: False,
            self.images: settings.images,
            self.sampler: settings.sampler or OWN_SAMPLER,
        }
        return {**updates, **self.method_values(settings.use)}

    def method_values(self, use: Use) -> dict[Any, Any]:
        """Updates that choose a method with its options."""
        updates: dict[Any, Any] = {self.method: use.method, **self._method_shown(use)}
        for name, value in use.options.items():
            shown = json.dumps(value, indent=1) if name == PLAN and not isinstance(value, str) else value
            updates[self.option_parts[use.method, name]] = shown
        return updates

    def _method_shown(self, use: Use) -> dict[Any, Any]:
        updates: dict[Any, Any] = {group: gr.update(visible=name == use.method) for name, group in self.groups.items()}
        updates[self.about] = about(use.method)
        try:
            updates[self.timeline] = timeline_html([] if use.method == UNCHANGED else timeline(use.checked()))
        except UserError as error:  # half-typed; drawing ends in the same message
            updates[self.timeline] = f"<p>{html.escape(message_of(error)[:200])}</p>"
        return updates

    def model_values(self, model: Model) -> dict[Any, Any]:
        """Updates that fit the form, and what follows it, to a model."""
        classes, names, pictures = model.kind == CLASSES, label_names(model), label_pictures(model.labels)
        height, width = model.size or (512, 512)
        self.kinds[model.name] = model.kind
        updates: dict[Any, Any] = {
            self.model: gr.update(value=model.name, choices=self.engine.models.names),
            self.fitted: model.name,
            self.label: gr.update(choices=names, value=names[0] if names else "0", visible=classes),
            self.pictures: gr.update(
                value=pictures, visible=bool(pictures), selected_index=0 if pictures else None, columns=7
            ),
            self.prompt: gr.update(visible=not classes),
            self.negative: gr.update(visible=not classes),
            self.steps: min(model.steps, self.engine.limits.steps),
            self.guidance: model.guidance_scale,
            self.width: width,
            self.height: height,
            self.sampler: gr.update(
                choices=sampler_choices(model), value=OWN_SAMPLER, info=f"Own: {sampler_name(model.pipe.scheduler)}"
            ),
            **self._method_shown(Use()),
            self.method: gr.update(choices=method_choices(model), value=UNCHANGED),
        }
        for follow in self.followers:
            updates |= follow(model)
        return updates

    @property
    def model_outputs(self) -> list[Any]:
        """Components that a change of the model sets."""
        return [
            self.model, self.fitted, self.label, self.pictures, self.prompt, self.negative, self.steps, self.guidance,
            self.width, self.height, self.sampler, self.method, self.about, self.timeline, *self.groups.values(),
            *self.followed,
        ]  # fmt: skip

    # What moves in it

    def wire(self) -> None:
        """Connect the parts of the form with each other."""
        quiet = {**QUIET, "preprocess": False, "trigger_mode": "always_last"}
        # Of what is shown the field decides, whoever filled it: the picture framed, the preset, aspect and size.
        self.label.change(self._pictured, [self.fitted, self.label], [self.pictures], **quiet)
        self.pictures.select(self._label_of_picture, [self.fitted], [self.label], **QUIET)
        self.preset.input(self._preset_chosen, [self.fitted, self.preset], [self.steps, self.guidance], **quiet)
        size = [self.width, self.height]
        for part in (self.aspect, self.scale):
            part.input(self._size_chosen, [self.fitted, self.aspect, self.scale], size, **quiet)
        numbers = [self.steps, self.guidance, *size]
        gr.on(
            [part.change for part in numbers], self._named, [self.fitted, *numbers],
            [self.preset, self.aspect, self.scale, self.size_note], **quiet,
        )  # fmt: skip
        options = list(self.option_parts.values())
        shown = [self.about, self.timeline, *self.groups.values()]
        for (owner, name), part in self.option_parts.items():
            moved = part.blur if name == PLAN else part.change
            moved(self._method_moved, [self.method, *options], shown, **quiet)
            if owner == PLAN:
                self.plan_file.upload(_read_plan, [self.plan_file], [part], **QUIET)
        # It does not set the method itself, which would be a change again.
        self.method.change(self._method_moved, [self.method, *options], shown, **quiet)

    def _model(self, name: Any) -> Model:
        try:
            return self.engine.models.get(name if isinstance(name, str) else "")
        except EXPECTED as error:
            raise as_gradio_error(error) from error

    def _pictured(self, name: str, label: Any) -> Any:
        names = [found for _, found in label_pictures(self._model(name).labels)]
        return gr.update(selected_index=names.index(label) if label in names else None)

    def _label_of_picture(self, name: str, chosen: gr.SelectData) -> Any:
        pictured = label_pictures(self._model(name).labels)
        return pictured[chosen.index][1] if chosen.index < len(pictured) else gr.update()

    def _preset_chosen(self, name: str, preset: str) -> tuple[int, float]:
        return preset_values(self._model(name), preset, self.engine.limits.steps)

    def _size_chosen(self, name: str, aspect: Any, scale: Any) -> tuple[int, int]:
        model = self._model(name)
        return fitting_size(model.size or (512, 512), model.unit, ASPECTS.get(aspect, 1.0), SCALES.get(scale, 1.0))

    def _named(self, name: str, steps: Any, guidance: Any, width: Any, height: Any) -> tuple[Any, Any, Any, str]:
        """Names of the preset, aspect and size that these numbers are, None where they are none; and a note."""
        model, most = self._model(name), self.engine.limits.steps
        preset = next((p for p in PRESETS if preset_values(model, p, most) == (steps, guidance)), None)
        aspect, scale = named_size(model, width, height)
        return preset, aspect, scale, size_note(model, width, height)

    def _method_moved(self, method: Any, *values: Any) -> dict[Any, Any]:
        options = {
            name: value for (owner, name), value in zip(self.option_parts, values, strict=True) if owner == method
        }
        return self._method_shown(Use(method if method in METHODS else UNCHANGED, options))


def _number(label: str, value: float | None, name: str, **more: Any) -> gr.Number:
    """A number without bounds of its own: `Settings.checked` names the field and the bounds in its message."""
    return gr.Number(value, label=label, elem_id=name, **{"min_width": 120, **more})


def _option_part(method: str, option: Option) -> Any:
    shared: Mapping[str, Any] = {
        "label": LABELS.get(option.name, option.label),
        "elem_id": f"{method}-{option.name}".replace("_", "-"),
    }
    about = option.about or None
    if option.kind == "choice":
        return gr.Radio([plain(choice) for choice in option.choices], value=plain(option.default), info=about, **shared)
    if option.kind == "flag":
        return gr.Checkbox(option.default, info=about, **shared)
    if option.kind == "counts":
        return gr.Textbox(option.default, max_length=400, info=about, **shared)
    if option.kind == "plan":
        return gr.Textbox("", lines=4, max_lines=12, max_length=MAX_PLAN_BYTES, info=about, **shared)
    if option.high > 10_000 or option.default is None:
        return gr.Number(option.default, info=about, **shared)
    return gr.Slider(option.low, option.high, value=option.default, step=option.step, info=about, **shared)


def _read_plan(path: str) -> str:
    try:
        if Path(path).stat().st_size > MAX_PLAN_BYTES:
            raise UserError(f"a plan file has at most {MAX_PLAN_BYTES:,} bytes")
        content = Path(path).read_text(encoding="utf-8")
        Use(PLAN, {PLAN: content}).checked()
        return content
    except UnicodeDecodeError as error:
        raise as_gradio_error(UserError("the plan file is no text")) from error
    except EXPECTED as error:
        raise as_gradio_error(error) from error
