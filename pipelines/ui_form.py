"""The form that says what to draw; all tabs read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.session import Engine
from pipelines.engine.settings import MAX_SEED, Settings
from pipelines.label_pictures import label_pictures
from pipelines.methods.catalogue import METHODS
from pipelines.methods.counts import draw_parts
from pipelines.methods.options import PLAN, UNCHANGED, Option, plain
from pipelines.methods.uses import Use, find_method, timeline
from pipelines.samplers import sampler_name, sampler_names
from pipelines.ui_events import EXPECTED, as_gradio_error, message_of

ASPECTS = {"Square": 1.0, "Portrait 3:4": 3 / 4, "Landscape 4:3": 4 / 3, "Tall 9:16": 9 / 16, "Wide 16:9": 16 / 9}
SCALES = {"trained size": 1.0, "1.5 × larger": 1.5, "2 × larger": 2.0, "4 × larger": 4.0}
PRESETS = {"Quick": (0.4, None), "Standard": (1.0, None), "Fine": (2.0, None), "Strong guidance": (1.0, 1.75)}
OWN_SAMPLER = "the model's own"
MAX_PLAN_BYTES = 1 << 20


class Form:
    """The components, the settings that they say, and what changes in them when the model does.

    Args:
        engine: whose models and limits are offered.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first = engine.models.get(engine.default_model)

    # Made in the order of the page

    def make_choice(self) -> None:
        """Model, prompt or class."""
        model, classes = self.first, self.first.kind == CLASSES
        with gr.Row():
            self.model = gr.Dropdown(
                self.engine.models.names,
                value=model.name,
                label="Model",
                info="or type a hub id, folder or file" if self.engine.models.allowed is None else "Loaded when chosen",
                allow_custom_value=self.engine.models.allowed is None,
                elem_id="model",
            )
            self.label = gr.Dropdown(
                _label_names(model),
                value=_label_names(model)[0] if classes and model.labels else None,
                label="Class",
                info="Type to search",
                filterable=True,
                allow_custom_value=True,
                visible=classes,
                elem_id="label",
            )
        self.pictures = gr.Gallery(
            label_pictures(model.labels),
            label="Classes: choose one by its picture",
            columns=7,
            height="auto",
            allow_preview=False,
            fit_columns=False,
            object_fit="contain",
            buttons=[],
            visible=bool(label_pictures(model.labels)),
            elem_id="labels",
            elem_classes=["tiny-pictures"],
        )
        self.prompt = gr.Textbox(
            label="Prompt",
            lines=2,
            max_length=self.engine.limits.characters,
            placeholder="what to draw",
            visible=not classes,
            elem_id="prompt",
        )

    def make_presets(self) -> None:
        """Presets of steps and guidance."""
        self.preset = gr.Radio(list(PRESETS), value="Standard", label="Preset", elem_id="preset")

    def make_method(self) -> None:
        """Method, its options and their picture."""
        self.method = gr.Radio(
            _method_choices(self.first), value=UNCHANGED, label="Attention method", info=METHODS[UNCHANGED].about,
            elem_id="method",
        )  # fmt: skip
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
        self.timeline = gr.Image(
            draw_parts(timeline(Use()), "Attention over time"),
            label="Attention over time",
            format="png",
            interactive=False,
            buttons=[],
            elem_id="timeline",
        )

    def make_details(self) -> None:
        """Steps, guidance, size, seed, number."""
        model, limits = self.first, self.engine.limits
        height, width = model.size or (512, 512)
        with gr.Row():
            self.steps = gr.Slider(
                1,
                min(250, limits.steps),
                value=min(model.steps, limits.steps),
                step=1,
                label="Steps",
                info="of the sampler",
                elem_id="steps",
            )
            self.guidance = gr.Slider(
                0,
                20,
                value=model.guidance_scale,
                step=0.1,
                label="Guidance scale",
                info="1 is none",
                elem_id="guidance",
            )
        with gr.Row():
            self.aspect = gr.Dropdown(list(ASPECTS), value="Square", label="Aspect", elem_id="aspect")
            self.scale = gr.Dropdown(list(SCALES), value="trained size", label="Size", elem_id="scale")
        with gr.Row():
            self.width = gr.Number(width, label="Width, px", precision=0, minimum=1, elem_id="width")
            self.height = gr.Number(height, label="Height, px", precision=0, minimum=1, elem_id="height")
        with gr.Row():
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, info="picture k has seed + k", elem_id="seed"
            )
            self.new_seed = gr.Checkbox(True, label="New seed each time", elem_id="new-seed")
        self.images = gr.Slider(
            1, min(16, limits.images), value=1, step=1, label="Number of pictures", elem_id="images"
        )
        self.sampler = gr.Dropdown(
            sampler_choices(model), value=OWN_SAMPLER, label="Sampler", elem_id="sampler",
            info=f"Own: {sampler_name(model.pipe.scheduler)}",
        )  # fmt: skip
        self.negative = gr.Textbox(
            label="Negative prompt",
            lines=1,
            max_length=limits.characters,
            visible=model.kind != CLASSES,
            elem_id="negative",
        )
        self.keep_settings = gr.Checkbox(
            True, label="Write the settings into the files", info="needed to recall a picture", elem_id="keep-settings"
        )
        self.remember = gr.Checkbox(
            True,
            label="Keep this form in the browser",
            info="it comes back when the page is opened again; untick to forget it",
            elem_id="remember",
        )

    # What it says

    @property
    def inputs(self) -> list[Any]:
        """Components that `settings` reads, in its order."""
        return [
            self.model, self.label, self.prompt, self.negative, self.method, self.steps, self.guidance, self.width,
            self.height, self.seed, self.new_seed, self.images, self.sampler, *self.option_parts.values(),
        ]  # fmt: skip

    def settings(self, *values: Any) -> Settings:
        """The settings, unchecked; UserError for what is missing."""
        model, label, prompt, negative, method, steps, guidance, width, height, seed, new, images, sampler = values[:13]
        options = {
            name: value
            for (owner, name), value in zip(self.option_parts, values[13:], strict=True)
            if owner == method and value is not None
        }
        classes = self.engine.models.get(model or "").kind == CLASSES
        return Settings(
            prompt=(label if classes else prompt) or "",
            negative_prompt="" if classes else negative or "",
            model=model or "",
            method=method,
            options=options,
            sampler=None if sampler == OWN_SAMPLER else sampler,
            steps=steps,
            guidance_scale=guidance,
            height=None if height is None else int(height),
            width=None if width is None else int(width),
            seed=None if new or seed is None else int(seed),
            images=images,
        )

    @property
    def outputs(self) -> list[Any]:
        """Components that `values_of` sets."""
        return [*self.inputs, *self.groups.values(), self.timeline]

    def values_of(self, settings: Settings) -> dict[Any, Any]:
        """Updates that make the form say these settings; the model's own updates come first."""
        model = self.engine.models.get(settings.model)
        updates: dict[Any, Any] = {
            self.label: settings.prompt if model.kind == CLASSES else gr.update(),
            self.prompt: gr.update() if model.kind == CLASSES else settings.prompt,
            self.negative: settings.negative_prompt,
            self.steps: settings.steps or model.steps,
            self.guidance: model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale,
            self.width: settings.width or (model.size or (512, 512))[1],
            self.height: settings.height or (model.size or (512, 512))[0],
            self.seed: settings.seed,
            self.new_seed: False,
            self.images: settings.images,
            self.sampler: settings.sampler or OWN_SAMPLER,
        }
        return {**updates, **self.method_values(settings.use)}

    def method_values(self, use: Use) -> dict[Any, Any]:
        """Updates that choose a method with its options."""
        import json

        updates: dict[Any, Any] = {self.method: gr.update(value=use.method, info=find_method(use.method).about)}
        for name, value in use.options.items():
            shown = json.dumps(value, indent=1) if name == PLAN else value
            updates[self.option_parts[use.method, name]] = shown
        updates |= {group: gr.update(visible=name == use.method) for name, group in self.groups.items()}
        updates[self.timeline] = draw_parts(timeline(use.checked()), "Attention over time")
        return updates

    # What moves in it

    def wire(self) -> None:
        """Connect the parts of the form with each other."""
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        self.model.input(
            self._model_changed, [self.model], self.model_outputs, show_progress_on=[self.model],
            api_visibility="private", concurrency_limit=1,
        )  # fmt: skip
        self.pictures.select(self._label_of_picture, [self.model], [self.label], **quiet)
        self.preset.input(self._preset_chosen, [self.model, self.preset], [self.steps, self.guidance], **quiet)
        size = [self.width, self.height]
        for part in (self.aspect, self.scale):
            part.input(self._size_chosen, [self.model, self.aspect, self.scale], size, **quiet)
        options = list(self.option_parts.values())
        self.method.input(self._about, [self.method], [self.method], **quiet)
        # By a click or by an example. It does not set the method itself, which would be a change again.
        self.method.change(
            self._method_changed, [self.method, *options], [*self.groups.values(), self.timeline], **quiet
        )
        for (owner, name), part in self.option_parts.items():
            if name != PLAN:
                part.change(self._draw_timeline, [self.method, *options], [self.timeline], **quiet)
            elif owner == PLAN:
                part.blur(self._draw_timeline, [self.method, *options], [self.timeline], **quiet)
                self.plan_file.upload(_read_plan, [self.plan_file], [part], **quiet)

    @property
    def model_outputs(self) -> list[Any]:
        """Components that a change of the model sets."""
        return [
            self.label, self.pictures, self.prompt, self.negative, self.method, self.steps, self.guidance, self.width,
            self.height, self.sampler,
        ]  # fmt: skip

    def _model_changed(self, name: str) -> dict[Any, Any]:
        try:
            return self.model_values(self.engine.models.get(name or ""))
        except EXPECTED as error:
            raise as_gradio_error(error) from error

    def model_values(self, model: Model) -> dict[Any, Any]:
        """Updates that fit the form to a model."""
        classes, names, pictures = model.kind == CLASSES, _label_names(model), label_pictures(model.labels)
        height, width = model.size or (512, 512)
        return {
            self.label: gr.update(choices=names, value=names[0] if names else "0", visible=classes),
            self.pictures: gr.update(value=pictures, visible=bool(pictures)),
            self.prompt: gr.update(visible=not classes),
            self.negative: gr.update(visible=not classes),
            self.method: gr.update(choices=_method_choices(model), value=UNCHANGED),
            self.steps: min(model.steps, self.engine.limits.steps),
            self.guidance: model.guidance_scale,
            self.width: width,
            self.height: height,
            self.sampler: gr.update(
                choices=sampler_choices(model),
                value=OWN_SAMPLER,
                info=f"Own: {sampler_name(model.pipe.scheduler)}",
            ),
        }

    def _label_of_picture(self, name: str, chosen: gr.SelectData) -> str:
        pictured = label_pictures(self.engine.models.get(name).labels)
        return pictured[chosen.index][1]

    def _preset_chosen(self, name: str, preset: str) -> tuple[int, float]:
        model = self.engine.models.get(name)
        steps, guidance = PRESETS[preset]
        most = min(250, self.engine.limits.steps)
        return min(most, max(1, round(model.steps * steps))), round(model.guidance_scale * (guidance or 1), 1)

    def _size_chosen(self, name: str, aspect: str, scale: str) -> tuple[int, int]:
        model = self.engine.models.get(name)
        return fitting_size(model.size or (512, 512), model.unit, ASPECTS[aspect], SCALES[scale])

    def _about(self, method: str) -> Any:
        return gr.update(info=find_method(method).about)

    def _method_changed(self, method: str, *values: Any) -> dict[Any, Any]:
        updates: dict[Any, Any] = {group: gr.update(visible=name == method) for name, group in self.groups.items()}
        updates[self.timeline] = self._draw_timeline(method, *values)
        return updates

    def _draw_timeline(self, method: str, *values: Any) -> Any:
        options = {
            name: value for (owner, name), value in zip(self.option_parts, values, strict=True) if owner == method
        }
        try:
            return draw_parts(timeline(Use(method, options).checked()), "Attention over time")
        except UserError as error:  # half-typed; drawing it will say the same
            return draw_parts([], message_of(error)[:90])


def fitting_size(trained: tuple[int, int], unit: int, aspect: float, scale: float) -> tuple[int, int]:
    """(width, height) of about the trained area times scale², in whole units.

    Args:
        trained: (height, width) in pixels.
        unit: what both are multiples of.
        aspect: width over height.
        scale: times a side.
    """
    side = (trained[0] * trained[1]) ** 0.5 * scale
    width, height = side * aspect**0.5, side / aspect**0.5
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)


def _label_names(model: Model) -> list[str]:
    return [model.label_text(number) for number in sorted(model.labels)]


def _method_choices(model: Model) -> Sequence[tuple[str, str]]:
    return [(METHODS[name].title, name) for name in model.methods]


def sampler_choices(model: Model) -> list[str]:
    """Samplers as the form offers them, the model's own first."""
    return [OWN_SAMPLER, *sampler_names(model.pipe)]


def _option_part(method: str, option: Option) -> Any:
    shared: Mapping[str, Any] = {"label": option.label, "elem_id": f"{method}-{option.name}".replace("_", "-")}
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
        precision = 0 if option.kind == "count" else None
        return gr.Number(
            option.default, minimum=option.low, maximum=option.high, precision=precision, info=about, **shared
        )
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
