"""What the layers of a core host are in: the call of their model, and the product that is being caught."""

from __future__ import annotations

import threading
from typing import Any

import torch

from attngen.layers.call import Call


class Calls:
    """The calls of one model, by thread; recomputation outside of any call belongs to the last one."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._last: Call | None = None

    def push(self, call: Call | None) -> None:
        """Begin a call of the model; None where nothing is known about it."""
        _list_of(self._local).append(call)
        self._last = call

    def pop(self) -> None:
        """End it."""
        stack = _list_of(self._local)
        if stack:
            stack.pop()

    @property
    def now(self) -> Call | None:
        """The call that a layer belongs to."""
        if torch.compiler.is_compiling():
            return self._last
        stack = _list_of(self._local)
        return stack[-1] if stack else self._last

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


class Products:
    """The layers that a thread is in, the innermost last: what catches a layer's products, or None where nothing does.

    Attention backends are functions of the process, so this is where they find the layer that calls them.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: list[Any] = []

    def push(self, product: Any) -> None:
        """Enter a layer."""
        self._stack.append(product)

    def pop(self) -> Any:
        """Leave it; returns what was pushed."""
        stack = self._stack
        return stack.pop() if stack else None

    @property
    def now(self) -> Any:
        """Of the innermost layer, or None."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def _stack(self) -> list[Any]:
        # Compilers trace no thread-local state, and trace one function at a time.
        return self._traced if torch.compiler.is_compiling() else _list_of(self._local)


def _list_of(local: threading.local) -> list[Any]:
    if not hasattr(local, "entries"):
        local.entries = []
    return local.entries


PRODUCTS = Products()
