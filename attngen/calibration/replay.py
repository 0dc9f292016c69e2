"""One call of a layer, computed again by other methods from the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attngen.hosts.core import core_enter
from attngen.hosts.product import core_layer
from attngen.hosts.spec import decide
from attngen.layer_rows import layer_shape
from attngen.layers.call import CHANNEL_KEY, Call
from attngen.layers.layer import Layer
from attngen.layers.route import EXACT, Route, exact
from attngen.methods import AttentionMethod


class Replay:
    """One call of a layer, to be computed again by other methods."""

    def __init__(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attn, self.args, self.kwargs = attn, args, kwargs
        self.enter = core_enter(attn)  # of a core host, or None
        self.call: Call | None = kwargs.get(CHANNEL_KEY) if self.enter is None else self.enter.calls.now
        first = args[0] if args else next(iter(kwargs.values()))
        self.hidden_states: Tensor = kwargs.get("hidden_states", first)
        text = kwargs.get("encoder_hidden_states")
        in_front = 0 if self.call is None or text is not None else self.call.context
        self.context_tokens: int = in_front if text is None else text.shape[1]
        self.tokens: int = self.hidden_states.shape[1] - in_front
        if self.call is not None and (self.enter is not None or self.tokens > math.prod(self.call.grid)):
            # Reference images follow the image, and are context.
            self.context_tokens += self.tokens - math.prod(self.call.grid)
            self.tokens = math.prod(self.call.grid)

    @property
    def layer(self) -> Layer:
        """The layer as its host sees it."""
        if self.enter is not None and self.enter.seen is not None:
            return core_layer(self.attn, *self.enter.seen)
        return self.attn.processor.layer(self.attn, self.context_tokens)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes that its time depends on."""
        layer = self.layer
        sizes = tuple(self.hidden_states.shape), self.context_tokens, layer.heads, layer.width
        return (*sizes, None if self.call is None else self.call.grid)

    def route(self, method: AttentionMethod) -> Route:
        """The layer's route with a method."""
        if self.enter is not None and self.enter.seen is None:
            return exact("its product was not over the image")
        layer = self.layer
        like = layer.like(self.hidden_states)
        like = like.sized(like.shape[0], self.tokens, *like.shape[2:])
        return decide(layer, None if self.call is None else self.call._replace(method=method), like)

    def operations(self, methods: Sequence[AttentionMethod], routes: Mapping[int, Route]) -> dict[int, float]:
        """Of one sample and call, by probe; -1 is exact."""
        assert self.call is not None
        if all(route.kernel == EXACT for route in routes.values()):
            return dict.fromkeys((-1, *routes), 0.0)
        shape = layer_shape(self.layer, self.call.grid)
        found = {-1: float(shape.exact_flops())}
        for i, route in routes.items():
            found[i] = shape.exact_flops() if route.kernel == EXACT else methods[i].flops(shape, route.kernel)
        return found

    def output(self, method: AttentionMethod) -> Any:
        """The layer's output with a method. Its own hooks are not called."""
        assert self.call is not None
        call = self.call._replace(method=method, trace=None)
        if self.enter is None:
            return self.attn.forward(*self.args, **{**self.kwargs, CHANNEL_KEY: call})
        with self.enter.catching(self.attn, call):
            return self.attn.forward(*self.args, **self.kwargs)

    def image(self, method: AttentionMethod) -> Tensor:
        """The image tokens of that output; of a core host's layer all of it, since their order is the model's."""
        return self.of_image(self.output(method))

    def of_image(self, output: Any) -> Tensor:
        """The part of an output that errors are measured on."""
        if self.enter is not None:
            return prediction_of(output)
        return output[0] if isinstance(output, tuple) else output


def prediction_of(output: Any) -> Tensor:
    """All tensors of a model's output, flat: a ControlNet has many."""
    values: list[Any] = [output]
    if isinstance(output, (tuple, list)):
        values = list(output)
    elif not isinstance(output, Tensor) and hasattr(output, "values"):
        values = list(output.values())
    flat: list[Tensor] = []
    for value in values:
        flat += [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, Tensor)]
    return torch.cat([x.detach().float().flatten() for x in flat])
