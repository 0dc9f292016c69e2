"""The calls that a model of a core host is in: what reaches its layers where no argument of the model does."""

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
        self._traced: list[Any] = []

    def push(self, call: Call | None) -> None:
        """Begin a call of the model; None where nothing is known about it."""
        self._of_thread("calls").append(call)
        self._last = call

    def pop(self) -> None:
        """End it."""
        stack = self._of_thread("calls")
        if stack:
            stack.pop()

    @property
    def now(self) -> Call | None:
        """The call that a layer belongs to."""
        if torch.compiler.is_compiling():
            return self._last
        stack = self._of_thread("calls")
        return stack[-1] if stack else self._last

    def enter(self, mode: Any) -> None:
        """Begin a mode around a layer."""
        mode.__enter__()
        self._modes.append(mode)

    def leave(self) -> None:
        """End it."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)

    @property
    def _modes(self) -> list[Any]:
        return self._traced if torch.compiler.is_compiling() else self._of_thread("modes")

    def _of_thread(self, name: str) -> list[Any]:
        if not hasattr(self._local, name):
            setattr(self._local, name, [])
        return getattr(self._local, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()
