"""What one denoiser call is about, in the form that travels to the layers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attngen.checks import Grid

CHANNEL_KEY = "attngen"
"""Key of the payload in diffusers' attention kwargs, and name of the processors' argument."""


class StepInfo(NamedTuple):
    """Immutable, made anew for every call of the denoiser and handed down as an argument.

    So gradient checkpointing, threads and `torch.compile` see the values of the call that a layer belongs to.

    Attributes:
        stage: index of the plan's stage, as text: torch.compile takes text for a constant, one graph a stage.
        grid: (height, width) of the image tokens where the payload is.
        context: text tokens in front of the image tokens in layers that see one joint sequence.
        metric: (B, N, C), the transformer block's input, where a method measures similarity on it.
        draws: (K,) random whole numbers of this time step, where a method wants them.
    """

    stage: str
    grid: Grid
    context: int = 0
    metric: Tensor | None = None
    draws: Tensor | None = None


class Slot(NamedTuple):
    """Where an argument of a forward method is: its name, and its position when it is given by position."""

    name: str
    index: int

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self.index] if len(args) > self.index else kwargs.get(self.name)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > self.index:
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}
