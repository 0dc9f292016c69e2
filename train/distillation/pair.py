"""The exact model and the one that learns, which are one model, patched and paused; and how far they are apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attngen.layers.call import CHANNEL_KEY
from train.distillation.inputs import Call, latents_of

if TYPE_CHECKING:
    from attngen.patch import AttentionPatch

PREDICTION = "prediction"
TINY = 1e-12


@dataclass
class Exact:
    """One call of the exact model.

    Attributes:
        prediction: its output.
        layers: layer -> the arguments of the layer, and its output.
    """

    prediction: Tensor
    layers: dict[str, tuple[Call, Tensor]]


class Pair:
    """The exact model and the patched one, and how far they are apart on a call.

    Args:
        model: the denoiser, patched.
        patch: the patch, of learned layers.
        autocast: context that networks run in.
    """

    def __init__(self, model: nn.Module, patch: AttentionPatch, autocast: Any = contextlib.nullcontext) -> None:
        self.model, self.patch, self.autocast = model, patch, autocast
        self.names = list(patch.learned)
        self._payloads: dict[Any, dict[str, Any]] = {}

    def exact(self, call: Call) -> Exact:
        """Run the exact model and keep what its layers were given and gave."""
        layers: dict[str, tuple[Call, Tensor]] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                layers[name] = Call(args, kwargs), output

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in self.names
        ]
        try:
            with self.patch.paused(), torch.no_grad(), self.autocast():
                return Exact(_prediction(self.model, call), layers)
        finally:
            for handle in handles:
                handle.remove()

    def student(self, call: Call) -> Tensor:
        """The patched model's prediction."""
        with self.autocast():
            return _prediction(self.model, call)

    def layer(self, name: str, exact: Exact, call: Call) -> Tensor:
        """The output of a learned layer for what the exact layer was given."""
        given, _ = exact.layers[name]
        payload = self._payload(call)[name]
        with self.autocast():
            return self.model.get_submodule(name)(*given.args, **given.kwargs, **{CHANNEL_KEY: payload})

    def _payload(self, call: Call) -> dict[str, Any]:
        """What the patch tells each layer about a call of this size; found out by making one."""
        size = latents_of(self.model, call).shape
        if size in self._payloads:
            return self._payloads[size]
        found: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[name] = kwargs[CHANNEL_KEY]

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            for name in self.names
        ]
        try:
            with torch.no_grad():
                self.student(call)
        finally:
            for handle in handles:
                handle.remove()
        return self._payloads.setdefault(size, found)

    def squared_errors(self, call: Call) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each layer and for the prediction: its name, its squared error and its squared size.

        One after the other, so that the graph of one is gone before the next one is made.
        """
        exact = self.exact(call)
        for name in self.names:
            wanted = exact.layers[name][1].float()
            yield name, (self.layer(name, exact, call).float() - wanted).square().sum(), wanted.square().sum()
        wanted = exact.prediction.float()
        yield PREDICTION, (self.student(call).float() - wanted).square().sum(), wanted.square().sum()


def _prediction(model: nn.Module, call: Call) -> Tensor:
    output = model(*call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output.sample


def measure(pair: Pair, calls: Sequence[Call]) -> dict[str, float]:
    """Relative errors (root of squared error over squared size) of each layer and of the prediction, over all calls."""
    errors: dict[str, float] = {}
    sizes: dict[str, float] = {}
    with torch.no_grad():
        for call in calls:
            for name, error, size in pair.squared_errors(call):
                errors[name] = errors.get(name, 0.0) + float(error)
                sizes[name] = sizes.get(name, 0.0) + float(size)
    return {name: math.sqrt(errors[name] / (sizes[name] + TINY)) for name in errors}


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Errors side by side."""
    width = max(map(len, before))
    lines = [f"{'relative error':{width}}  before   after   times lower"]
    for name, error in before.items():
        lines.append(f"{name:{width}}  {error:.4f}  {after[name]:.4f}  {error / max(after[name], TINY):.2f}")
    return "\n".join(lines)
