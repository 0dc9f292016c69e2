"""Models as they were before something was tried on them: patches, processors, hooks, learned layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from attngen.hosts.install import attention_modules
from attngen.hosts.layers import SPEC

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def restored(models: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever is done within it to the hooks and attention layers of `models` is undone at its end, or on an error.

    A patch that was on is on again, the same objects in the same order, so its handle still works.
    """
    models = list(models)
    hooks = [(table, dict(table)) for model in models for table in _hook_tables(model)]
    layers = [(attn, _layer(attn)) for model in models for _, attn in attention_modules(model)]
    try:
        yield
    finally:
        for attn, (own, children) in layers:
            _put_back(attn, own, children)
        # In place: handles that others hold refer to these very tables.
        for table, content in hooks:
            table.clear()
            table.update(content)


def _hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    return [getattr(module, name) for module in model.modules() for name in _HOOKS]


def _layer(attn: nn.Module) -> tuple[dict[str, Any], dict[str, nn.Module | None]]:
    own = {name: vars(attn)[name] for name in ("processor", SPEC) if name in vars(attn)}
    return own, dict(attn._modules)


def _put_back(attn: nn.Module, own: dict[str, Any], children: dict[str, nn.Module | None]) -> None:
    for name in ("processor", SPEC):
        vars(attn).pop(name, None)
    vars(attn).update(own)
    attn._modules.clear()
    attn._modules.update(children)
