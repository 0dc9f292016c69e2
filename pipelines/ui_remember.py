"""The form as it was left: kept in the browser, so that neither a reload nor a restart of the server loses it.

It lies in the browser's own storage, readable to whoever uses that browser, and comes to the server once, when the page
is opened. There it is checked like any other input, field by field: it may be old, of another model, or forged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from pipelines.cli import UserError
from pipelines.engine.models import CLASSES, Model
from pipelines.engine.settings import MAX_SEED, text, whole
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import PLAN, UNCHANGED, Option
from pipelines.methods.uses import Use
from pipelines.ui_events import EXPECTED, merged
from pipelines.ui_form import Form, sampler_choices

KEY = "attngen-form"
MAX_FIELD = 32 * 1024  # characters of one field; a longer plan is not kept
MAX_KEPT = 8 * MAX_FIELD
Check = Callable[[Any, Model], Any]

# Fields change while the page is being filled; until that is over nothing may be written over what was kept.
SAVE = """(...values) => {
  if (!window.attngenRemembers) return [];
  const names = %(names)s, form = {};
  names.forEach((name, i) => {
    if (JSON.stringify(values[i] ?? null).length <= %(most)d) form[name] = values[i];
  });
  const kept = form.remember ? form : { remember: false };
  try { localStorage.setItem("%(key)s", JSON.stringify(kept)); } catch { /* the browser keeps nothing */ }
  return [];
}"""
LOAD = """() => {
  try { return [localStorage.getItem("%s") ?? ""]; } catch { return [""]; }
}"""
BEGIN = "() => { window.attngenRemembers = true; return []; }"


class Memory:
    """Saves the form and the fields of other tabs whenever one changes, and fills them when the page is opened.

    Args:
        page: the page.
        form: that says what to draw; its box `remember` decides.
        others: further fields, each with its check: (what was kept, the model) -> the value. It raises what is
            expected where the value cannot be used. A component's elem_id is its name.
        status: where it is said that the form was filled.
    """

    def __init__(self, page: gr.Blocks, form: Form, others: Mapping[Any, Check], status: Any) -> None:
        self.models, self.form, self.status = form.engine.models, form, status
        self.checks: dict[Any, Check] = {**form_checks(form), **others}
        kept = [form.remember, form.model, *self.checks]
        names = json.dumps([part.elem_id for part in kept])
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        save = SAVE % {"names": names, "most": MAX_FIELD, "key": KEY}
        gr.on([part.change for part in kept], None, kept, None, js=save, **quiet)
        outputs = list(dict.fromkeys([*kept, *form.model_outputs, *form.outputs, status]))
        raw = gr.Textbox(visible=False, label="Kept form")
        opened = page.load(self.fill, [raw], outputs, js=LOAD % KEY, queue=False, **quiet)
        opened.then(None, None, None, js=BEGIN, **quiet)

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
        updates: dict[Any, Any] = {self.form.model: model.name, **self.form.model_values(model)}
        values = self._usable(kept, model)
        for part, value in {**values, **self._method(values)}.items():
            updates[part] = merged(updates.get(part), value)
        return {**updates, self.status: told}

    def _model(self, name: Any) -> Model:
        """The model of that name, if it is at hand: opening a page starts no download."""
        if name not in self.models.names:
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
    most = form.engine.limits.characters
    pixels = form.engine.limits.pixels
    checks: dict[Any, Check] = {
        form.label: lambda value, model: _label(value, model, most),
        form.prompt: lambda value, model: text("prompt", value, most),
        form.negative: lambda value, model: text("negative prompt", value, most),
        form.method: one_of(lambda model: model.methods),
        form.sampler: one_of(sampler_choices),
        form.seed: lambda value, model: whole("seed", value, 0, MAX_SEED),
        form.width: lambda value, model: whole("width", value, 1, pixels),
        form.height: lambda value, model: whole("height", value, 1, pixels),
    }
    checks |= {part: within(part) for part in (form.steps, form.guidance, form.images)}
    checks |= {part: one_of_its_own(part) for part in (form.aspect, form.scale, form.preset)}
    checks |= {part: is_box for part in (form.new_seed, form.keep_settings)}
    for (owner, name), part in form.option_parts.items():
        checks[part] = _of_option(next(option for option in METHODS[owner].options if option.name == name))
    return checks


def is_box(value: Any, model: Model) -> bool:
    """Whether a box was ticked."""
    if not isinstance(value, bool):
        raise UserError("a box is ticked or not")
    return value


def within(part: Any) -> Check:
    """A number between a component's bounds."""

    def check(value: Any, model: Model) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not part.minimum <= value <= part.maximum:
            raise UserError(f"{part.label} must be a number from {part.minimum} to {part.maximum}")
        return value

    return check


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
