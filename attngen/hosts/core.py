"""The core host: a model's own processors run, and only their product over image tokens goes through a method.

Projections, norms, rotation, the order of text and image, caches, LoRA and the output stay the model's. Hooks on an
attention module put a mode around it that catches its `scaled_dot_product_attention`; what it gives to diffusers'
dispatcher for a backend that is not torch's is caught in the dispatcher's registry (`backend`). `product` has what
becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attngen.hosts.backend import BackendAttention, CaughtBackend
from attngen.hosts.calls import PRODUCTS, Calls
from attngen.hosts.family import Core
from attngen.hosts.product import EXACT_ATTENTION, Asked, Exactly, attend, why_missed, why_unreachable
from attngen.hosts.spec import noted, spec_of
from attngen.layers.call import Call
from attngen.layers.route import exact


class Hook:
    """Base of the hooks on attention modules of a core host."""


class Enter(Hook):
    """Before an attention module: begins to catch its products, unless the plan or the call leave it exact.

    Attributes:
        seen: heads, head size, and tokens other than the image's, of the last product that had the image; for reports.
        caught: whether a product of the module was ever caught.
        missed: whether the module was called, and none was.
    """

    def __init__(self, calls: Calls, core: Core) -> None:
        self.calls, self.core = calls, core
        self.seen: tuple[int, int, int] | None = None
        self.caught = self.missed = False
        self._seen_in: tuple[Any, ...] | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        product, call = None, self.calls.now
        if call is not None:
            why = self._why_not_caught(module, call)
            if why is None:
                product = Product(module, self, call)
            else:
                noted(exact(why), module, call)
        PRODUCTS.push(product)
        if product is not None:
            product.__enter__()

    def _why_not_caught(self, module: nn.Module, call: Call) -> str | None:
        """Why the layer is exact whatever its products are; None too where a report has to see them first."""
        why = why_unreachable(module)
        if why is not None:
            return why
        spec = spec_of(module)
        assert spec is not None
        if spec.reduction(call) is not None:
            return None
        if not torch.compiler.is_compiling() and self._seen_in != (call.grid, call.context):
            return None
        return spec.why_exact(spec.method(call), call.grid, math.prod(call.grid))

    def saw(self, call: Call, heads: int, head_dim: int, others: int) -> None:
        """Note the sizes of a product over the image."""
        self.seen, self._seen_in = (heads, head_dim, others), (call.grid, call.context)

    @contextmanager
    def catching(self, module: nn.Module, call: Call) -> Generator[None]:
        """Within it the module's products belong to `call`."""
        product = Product(module, self, call)
        self.calls.push(call)
        PRODUCTS.push(product)
        try:
            with product:
                yield
        finally:
            PRODUCTS.pop()
            self.calls.pop()


class Leave(Hook):
    """After it, also where it raised."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        product = PRODUCTS.pop()
        if product is None:
            return
        product.__exit__(None, None, None)
        if not torch.compiler.is_compiling():
            product.left()


class Product(TorchFunctionMode):
    """Catches the attention products of one attention module in one call.

    Attributes:
        caught: whether there was one; not kept in compiled code.
    """

    def __init__(self, attn: nn.Module, enter: Enter, call: Call) -> None:
        super().__init__()
        self.attn, self.enter, self.call = attn, enter, call
        self.caught = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not EXACT_ATTENTION:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return self._attend(Asked(*args, **(kwargs or {})), _by_torch)

    def dispatched(self, backend: CaughtBackend, given: dict[str, Any]) -> Any:
        """A product that diffusers' dispatcher gives to a backend, tensors (B, N, H, D)."""
        if given.keys() - _OF_DISPATCHER:
            self.caught = True
            noted(exact(f"its {backend.name.value} attention gets arguments of its own"), self.attn, self.call)
            return backend.function(**given)
        options = {name: given[name] for name in Asked._fields[3:] if name in given}
        asked = Asked(*(given[name].transpose(1, 2) for name in Asked._fields[:3]), **options)

        def exactly(changed: Asked) -> Tensor:
            if changed is asked:
                return backend.function(**given).transpose(1, 2)
            heads = {name: getattr(changed, name).transpose(1, 2) for name in Asked._fields[:3]}
            others = {name: getattr(changed, name) for name in options}
            return backend.function(**{**given, **heads, **others}).transpose(1, 2)

        with torch._C.DisableTorchFunction():
            return self._attend(asked, exactly, BackendAttention(backend.name)).transpose(1, 2)

    def left(self) -> None:
        """The module was left: a trace has to show it where it had no product."""
        enter = self.enter
        enter.caught = enter.caught or self.caught
        enter.missed = not enter.caught
        if not self.caught:
            why = why_missed(self.attn) if enter.missed else "a cache has its output"
            noted(exact(why), self.attn, self.call)

    def _attend(self, asked: Asked, exactly: Exactly, attention: BackendAttention | None = None) -> Tensor:
        saw = None
        if not torch.compiler.is_compiling():
            self.caught, saw = True, partial(self.enter.saw, self.call)
        PRODUCTS.push(None)  # the parts of this product are not caught
        try:
            return attend(self.attn, self.enter.core, self.call, asked, exactly, attention, saw)
        finally:
            PRODUCTS.pop()


_OF_DISPATCHER = {*Asked._fields, "_parallel_config"}


def _by_torch(asked: Asked) -> Tensor:
    return EXACT_ATTENTION(**asked._asdict())


def core_enter(attn: nn.Module) -> Enter | None:
    """The hook that begins to catch a layer's products, or None where the layer is not of a core host."""
    return next((hook for hook in attn._forward_pre_hooks.values() if isinstance(hook, Enter)), None)
