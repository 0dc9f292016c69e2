"""Watching the calls of a pipeline's denoisers: to stop between two of them, and to count operations afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from attngen.hosts.families import denoisers_of
from attngen.layers.call import CHANNEL_KEY


class Stopped(Exception):
    """The work was stopped on request."""


class Call(NamedTuple):
    """One kind of call, to be made again.

    Attributes:
        model: the denoiser.
        args: of its forward.
        kwargs: of its forward, without what a patch adds.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallWatch:
    """A pre-hook on the denoisers.

    Args:
        stop: where this is set the next call raises `Stopped`.
        keep: whether to keep the first call of each kind (stage of the plan, mediators, sizes), for `count_flops`.

    Attributes:
        listener: called at each call, or None.
        counts: calls by kind.
        calls: first call by kind.
    """

    def __init__(self, stop: threading.Event, keep: bool = False) -> None:
        self.stop, self.keep = stop, keep
        self.listener: Callable[[], None] | None = None
        self.counts: dict[Any, int] = {}
        self.calls: dict[Any, Call] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.stop.is_set():
            raise Stopped
        if self.listener is not None:
            self.listener()
        if not self.keep:
            return
        kind = _kind(model, args, kwargs)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.calls:
            self.calls[kind] = Call(model, args, {name: _unpatched(value) for name, value in kwargs.items()})

    def count_flops(self) -> int | None:
        """Operations of all calls so far (two a multiply-add), by making one of each kind again; None without any.

        The same patch must be on, by a path made of torch's own operations: those of our Triton kernels are not seen.
        """
        if not self.calls:
            return None
        return sum(
            self.counts[kind] * count_operations(lambda call=call: call.model(*call.args, **call.kwargs))
            for kind, call in self.calls.items()
        )


@contextmanager
def watched(pipe: Any, watch: CallWatch) -> Iterator[None]:
    """Within it every call of the pipeline's denoisers goes by `watch`."""
    hooks = [model.register_forward_pre_hook(watch, with_kwargs=True) for model in _denoisers(pipe)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _denoisers(pipe: Any) -> list[nn.Module]:
    try:
        return list(denoisers_of(pipe).values())
    except ValueError:  # a family that attngen does not know can still be drawn with
        found = [getattr(pipe, name, None) for name in ("transformer", "unet")]
        return [model for model in found if isinstance(model, nn.Module)]


def _kind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    channels = [value for value in kwargs.values() if isinstance(value, dict) and CHANNEL_KEY in value]
    info = channels[0][CHANNEL_KEY] if channels else None
    shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    return id(model), info.stage if info else None, str(kwargs.get("num_mediators")), str(shapes)


def _unpatched(value: Any) -> Any:
    if isinstance(value, dict) and CHANNEL_KEY in value:
        return {name: entry for name, entry in value.items() if name != CHANNEL_KEY}
    return value


def count_operations(call: Callable[[], Any]) -> int:
    """Operations of a call, two a multiply-add; those of Triton kernels are not seen."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch itself counts attention on GPUs only.
    extra: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        call()
    return counter.get_total_flops()
