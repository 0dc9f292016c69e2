"""Which pipeline a model was patched through, so that another one that shares it does not change its pictures."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from attngen.hosts.hooks import root_hook

# Beside the models, not on them: a patch leaves nothing there, and copies of a model belong to nobody.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def check_owner(target: Any, models: Mapping[str, nn.Module]) -> None:
    """Let a pipeline change the models that no other living pipeline has patched; a bare model is its caller's own.

    Raises:
        ValueError: if another pipeline shares a model and its patch is on.
    """
    if target is None or isinstance(target, nn.Module):
        return
    for name, model in models.items():
        owner = _OWNERS[model]() if model in _OWNERS else None
        if owner is None or owner is target or root_hook(model) is None:
            continue
        raise ValueError(
            f"the {name} of this {type(target).__name__} is shared with a {type(owner).__name__} through which it is"
            f" patched already, and would change there too; take that patch off first (attngen.remove(pipe)), or give"
            f" this pipeline a copy of the model (copy.deepcopy)"
        )


def note_owner(target: Any, models: Mapping[str, nn.Module]) -> weakref.ref[Any] | None:
    """Remember the pipeline that models are patched through; returns a weak reference to it, None for a bare model."""
    for model in models.values():
        _OWNERS.pop(model, None)
    if target is None or isinstance(target, nn.Module):
        return None
    try:
        owner = weakref.ref(target)
    except TypeError:  # something like a pipeline that cannot be referred to
        return None
    for model in models.values():
        _OWNERS[model] = owner
    return owner
