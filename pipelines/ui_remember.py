"""The form as it was left: kept in the browser, so that neither a reload nor a restart of the server loses it.

It lies in the browser's own storage, readable to whoever uses that browser, and comes to the server once, when the page
is opened. There it is checked like any other input, field by field: it may be old, of another model, or forged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.settings import MAX_SEED, text, whole
from pipelines.engine.shipped import shipped_models
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import PLAN, UNCHANGED, Option
from pipelines.methods.uses import Use
from pipelines.ui_events import EXPECTED, QUIET, merged
from pipelines.ui_form import Form
from pipelines.ui_shown import sampler_choices

KEY = "attngen-form"
MAX_FIELD = 32 * 1024  # characters of one field; a longer plan is not kept
MAX_KEPT = 8 * MAX_FIELD
Check = Callable[[Any, Model], Any]
# For those who watch the page.
FILLED = "() => { window.attngenRemembers = true; return []; }"


class Memory:
    """Saves the form and the fields of other tabs whenever one changes, and fills them when the page is opened.

    Args:
        page: the page.
        form: that sets what to draw; its box `remember` decides.
        others: further fields, each with its check: (what was kept, the model) -> the value. It raises what is
            expected where the value cannot be used. A component's elem_id is its name.
        status: the line that shows that the form was filled.
    """

    def __init__(self, page: gr.Blocks, form: Form, others: Mapping[Any, Check], status: Any) -> None:
        self.models, self.form, self.status = form.engine.models, form, status
        self.checks: dict[Any, Check] = {**form_checks(form), **others}
        self.kept = [form.remember, form.model, *self.checks]
        state = gr.BrowserState("", storage_key=KEY, secret=KEY)
        # Fields change while the page is being filled; until that is over nothing is written over what was kept.
        filled = gr.State(False)
        quiet = {**QUIET, "preprocess": False, "trigger_mode": "always_last"}
        gr.on([part.change for part in self.kept], self.save, [filled, *self.kept], [state], **quiet)
        outputs = list(dict.fromkeys([*self.kept, *form.model_outputs, *form.outputs, status]))
        opened = page.load(self.fill, [state], outputs, **QUIET)
        opened.then(lambda: True, None, [filled], **QUIET).then(None, None, None, js=FILLED, **QUIET)

    def save(self, filled: bool, *values: Any) -> Any:
        """What the browser keeps: a JSON text of the fields by name, but for those that are too long."""
        if not filled:
            return gr.skip()
        form = {part.elem_id: value for part, value in zip(self.kept, values, strict=True)}
        if form["remember"] is not True:
            return json.dumps({"remember": False})
        return json.dumps({name: value for name, value in form.items() if len(json.dumps(value)) <= MAX_FIELD})

    def fill(self, raw: str) -> dict[Any, Any]:
        """Updates of the page from what the browser kept."""
        kept = parse(raw)
        if kept.get("remember") is not True:
            return {self.form.remember: gr.update() if "remember" not in kept else False}
        model, told = self.form.first, "Ready. The form is as you left it."
        try:
            model = self._model(kept.get("model"))
        except EXPECTED:
            name = str(kept.get("model"))[:100]
            told = f"Ready. The form is as you left it, but for the model: {name!r} is not loaded; choose it again."
        updates: dict[Any, Any] = self.form.model_values(model)
        values = self._usable(kept, model)
        for part, value in {**values, **self._method(values)}.items():
            updates[part] = merged(updates.get(part), value)
        return {**updates, self.status: told}

    def _model(self, name: Any) -> Model:
        """The model of that name, if it is at hand: opening a page starts no download."""
        here = isinstance(name, str) and (
            self.models.is_loaded(name) or shipped_models().get(name, Path(name)).exists()
        )
        if name not in self.models.names or not here:
            raise UserError(f"the model {str(name)[:100]!r} is not loaded")
        return self.models.get(name)

    def _usable(self, kept: Mapping[str, Any], model: Model) -> dict[Any, Any]:
        found = {}
        for part, check in self.checks.items():
            if kept.get(part.elem_id) is None:
                continue
            try:
                found[part] = check(kept[part.elem_id], model)
            except EXPECTED:
                continue  # half-typed, or of another time
        return found

    def _method(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """What a change of the method sets: its options in view, and their picture."""
        form = self.form
        method = values.get(form.method, UNCHANGED)
        parts = {name: part for (owner, name), part in form.option_parts.items() if owner == method}
        options = {name: values[part] for name, part in parts.items() if part in values}
        try:
            return form.method_values(Use(method, options).checked())
        except UserError:  # the plan was too long to be kept
            return form.method_values(Use())


def parse(raw: Any) -> dict[str, Any]:
    """What the browser sent as an object; empty where it is none."""
    if not isinstance(raw, str) or len(raw) > MAX_KEPT:
        return {}
    try:
        kept = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


# One field


def form_checks(form: Form) -> dict[Any, Check]:
    """The form's fields but the model, each with what its value must be."""
    limits = form.engine.limits
    most, pixels = limits.characters, limits.pixels
    checks: dict[Any, Check] = {
        form.label: lambda value, model: _label(value, model, most),
        form.prompt: lambda value, model: text("prompt", value, most),
        form.negative: lambda value, model: text("negative prompt", value, most),
        form.method: one_of(lambda model: model.methods),
        form.sampler: one_of(sampler_choices),
        form.seed: lambda value, model: whole("seed", value, 0, MAX_SEED),
        form.width: lambda value, model: whole("width", value, 1, pixels),
        form.height: lambda value, model: whole("height", value, 1, pixels),
        form.steps: lambda value, model: whole("steps", value, 1, limits.steps),
        form.images: lambda value, model: whole("images", value, 1, limits.images),
    }
    checks[form.guidance] = lambda value, model: is_number("guidance", value, 0, limits.guidance_scale)
    checks |= {part: is_box for part in (form.new_seed, form.keep_settings)}
    for (owner, name), part in form.option_parts.items():
        checks[part] = _of_option(next(option for option in METHODS[owner].options if option.name == name))
    return checks


def is_box(value: Any, model: Model) -> bool:
    """Whether a box was ticked."""
    if not isinstance(value, bool):
        raise UserError("a box is ticked or not")
    return value


def is_number(name: str, value: Any, low: float, high: float) -> float:
    """A number between two bounds; UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:60]!r}")
    return value


def one_of(choices: Callable[[Model], Sequence[str]]) -> Check:
    """One of the names that a model has."""

    def check(value: Any, model: Model) -> str:
        if value not in choices(model):
            raise UserError(f"{str(value)[:60]!r} is none of {choices(model)}")
        return value

    return check


def one_of_its_own(part: Any) -> Check:
    """One of a component's choices."""
    return one_of(lambda model: [value for _, value in part.choices])


def _label(value: Any, model: Model, most: int) -> str:
    if model.kind != CLASSES:
        raise UserError("the model has no classes")
    return model.label_text(model.label_of(text("class", value, most)))


def _of_option(option: Option) -> Check:
    if option.name == PLAN:
        return lambda value, model: text(PLAN, value, MAX_FIELD)
    return lambda value, model: option.checked(value)
