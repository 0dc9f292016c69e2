"""`register_model`: a row for a model class that attngen does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from attngen.checks import check_choice
from attngen.hosts.check import check_row
from attngen.hosts.families import FAMILIES, family_of, slots
from attngen.hosts.family import Core, Family, continuous, data_at_one, discrete, steps_to_data

CLOCKS: dict[str, Callable[[float], float]] = {
    "steps": discrete,
    "times": continuous,
    "times to data": data_at_one,
    "steps to data": steps_to_data,
}
TEXT = ("first", "last", "none")
Example = tuple[nn.Module, Mapping[str, Any]]


def register_model(
    name: str,
    *,
    grid: Callable[[nn.Module, dict[str, Any]], Sequence[int]],
    layers: str = "*",
    text: Literal["first", "last", "none"] = "none",
    sample: str = "hidden_states",
    time: str = "timestep",
    clock: Literal["steps", "times", "times to data", "steps to data"] = "steps",
    rotary: bool = True,
    text_argument: str | None = None,
    example: Example | None = None,
) -> None:
    """Describe a model class of your own or a new one of diffusers, so that `attngen.apply` patches it.

    The model's own processors run; its attention products over the image's tokens go through the plan's methods. Where
    the tokens of a call do not fit the row, the layer stays exact; `handle.trace()` gives the reason. With an example
    the row is tried: "softmax" has to be exact bit for bit, a method that keeps every token has to change nothing, and
    a corner of the latents has to change that corner's token.

    Args:
        name: of the class; classes that derive from it have the row as well.
        grid: (model, arguments of its forward by name) -> (height, width) or (frames, height, width) in tokens.
        layers: pattern of the names of the attention modules that see the image, such as "blocks.*.attn1"; several
            with | between them.
        text: where text tokens are in the sequence of these layers: "first", "last", or "none". Their number is what
            is not the image; reference images follow the image.
        sample: name of the forward argument with the latents.
        time: name of the forward argument with the timestep.
        clock: what the timestep is: "steps" (1,000 is noise), "times" (1 is noise), "times to data" (1 is data), or
            "steps to data".
        rotary: whether queries and keys are rotated by position.
        text_argument: name of the forward argument with the text tokens, needed where text is first and reference
            images follow the image.
        example: a model of the class in evaluation mode, and arguments of its forward by name, to try the row on.

    Raises:
        ValueError: for a class that has a row already, an argument that is none of the known ones, or a row that the
            example shows to be wrong, which is then not kept.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be that of a class, such as 'MyTransformer2DModel', got {name!r}")
    if name in FAMILIES:
        raise ValueError(f"{name} has a row already")
    if not callable(grid):
        raise ValueError(f"grid must be a function of the model and its arguments, got {grid!r}")
    check_choice("text", text, TEXT)
    check_choice("clock", clock, tuple(CLOCKS))

    def read(model: nn.Module, arguments: dict[str, Any]) -> tuple[int, ...]:
        sizes = tuple(int(size) for size in grid(model, arguments))
        if len(sizes) not in (2, 3) or min(sizes) < 1:
            raise ValueError(f"the grid of {name} must be (height, width) or (frames, height, width), got {sizes}")
        return sizes

    core = Core(layers, text)
    FAMILIES[name] = Family(sample, time, None, CLOCKS[clock], read, text=text_argument, rotary=rotary, core=core)
    if example is not None:
        try:
            _try(name, example)
        except BaseException:
            del FAMILIES[name]
            raise


def _try(name: str, example: Example) -> None:
    model, inputs = example
    if family_of(model) is not FAMILIES[name]:
        raise ValueError(f"example must be a model of {name} and its arguments, got a {type(model).__name__}")
    family = FAMILIES[name]
    places = slots(model)
    for argument in (family.sample, family.time):
        if argument not in places:
            raise ValueError(f"{argument!r} is no argument of the forward of {name}, which has {', '.join(places)}")
    check_row(model, inputs)
