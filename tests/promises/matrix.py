"""What people do to a patched pipeline: each function does one thing to it and checks what must hold then."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import attngen
from attngen import AttnGenWarning, SoftmaxAttention
from tests.builders.pipelines import AGENTS, KINDS, METHODS, STAGES, Kind, denoisers, exact, snapshots


class Failure(Exception):
    """Raised on purpose."""


@dataclass
class Case:
    """A pipeline of a kind, fresh and not patched, and the method to patch it with."""

    name: str
    method_name: str
    folder: Path

    def __post_init__(self) -> None:
        self.kind: Kind = KINDS[self.name]
        self.method = METHODS[self.method_name]
        self.pipe = self.kind.build()
        self.exact = exact(self.name)
        assert torch.equal(self.draw(), self.exact)  # a run leaves its settings on the pipeline
        self.clean = snapshots(self.pipe)

    def draw(self, pipe: Any = None, **kwargs: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnGenWarning)  # the tiny layers gain nothing, which it says
            return self.kind(self.pipe if pipe is None else pipe, **kwargs)

    def apply(self, pipe: Any = None) -> attngen.AttentionPatch:
        return attngen.apply(self.pipe if pipe is None else pipe, self.method, seed=3)

    def patched(self) -> Tensor:
        """The patched picture, checked: finite, repeatable, and changed where the method is one."""
        handle = self.apply()
        out = self.draw()
        active = any(layer.is_active for layer in handle.report().layers)
        assert out.shape == self.exact.shape and torch.isfinite(out).all()
        assert torch.equal(out, self.exact) == (not active or isinstance(self.method, SoftmaxAttention))
        return out

    def assert_restored(self, pipe: Any = None) -> None:
        """Nothing of a patch is left, and the picture is the stock one bit for bit."""
        pipe = self.pipe if pipe is None else pipe
        now = snapshots(pipe)
        if pipe is not self.pipe:  # a copy has processors of its own
            for part in (now, self.clean):
                for value in part.values():
                    if isinstance(value, dict):
                        value["processors"] = sorted(value["processors"])
        assert now == self.clean
        assert torch.equal(self.draw(pipe), self.exact)


def apply_and_remove(case: Case) -> None:
    case.patched()
    attngen.remove(case.pipe)
    case.assert_restored()


def twice(case: Case) -> None:
    once = case.patched()
    handle = case.apply()
    assert torch.equal(case.draw(), once)
    handle.remove()
    handle.remove()
    case.assert_restored()


def switch(case: Case) -> None:
    first = case.patched()
    for other in (STAGES, "softmax"):
        attngen.apply(case.pipe, other)
    assert torch.equal(case.draw(), case.exact)
    with case.apply():
        assert torch.equal(case.draw(), first)
    case.assert_restored()


def exception_at_each_call(case: Case) -> None:
    """An error in the k-th call of a patched layer, for every k of a whole run."""
    patched = case.patched()
    layers = [
        module for model in denoisers(case.pipe).values() for module in model.modules() if hasattr(module, "attngen")
    ]
    count, limit = 0, -1

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == limit:
            raise Failure

    hooks = [layer.register_forward_pre_hook(fail) for layer in layers]
    case.draw()
    total = count
    assert total >= len(layers)
    for limit in range(1, total + 1):
        count = 0
        with contextlib.suppress(Failure):
            case.draw()
            raise AssertionError(f"call {limit} of {total} did not fail")
    for hook in hooks:
        hook.remove()
    assert torch.equal(case.draw(), patched)
    attngen.remove(case.pipe)
    case.assert_restored()


def exception_inside_with(case: Case) -> None:
    with contextlib.suppress(Failure), case.apply():
        case.draw()
        raise Failure
    case.assert_restored()


def cancel_by_callback(case: Case) -> None:
    """Stopped by an error in the callback, and by diffusers' own flag."""
    if not case.kind.callback:
        return
    patched = case.patched()

    def stop() -> None:
        raise Failure

    with contextlib.suppress(Failure):
        case.draw(**case.kind.steps(stop))
        raise AssertionError("the callback was not called")
    assert torch.equal(case.draw(), patched)
    if hasattr(type(case.pipe), "interrupt"):
        calls = []

        def interrupt() -> None:
            calls.append(1)
            case.pipe._interrupt = True

        case.draw(**case.kind.steps(interrupt))
        assert len(calls) == 1
        assert torch.equal(case.draw(), patched)
    attngen.remove(case.pipe)
    case.assert_restored()


def _copied(case: Case, other: Any, patched: Tensor) -> None:
    """The copy is patched, and what is done to one is not done to the other."""
    assert torch.equal(case.draw(other), patched)
    attngen.remove(case.pipe)
    case.assert_restored()
    assert torch.equal(case.draw(other), patched)
    case.apply()
    attngen.remove(other)
    assert torch.equal(case.draw(other), case.exact)
    assert torch.equal(case.draw(), patched)
    attngen.remove(case.pipe)
    case.assert_restored()


def deepcopied(case: Case) -> None:
    patched = case.patched()
    _copied(case, copy.deepcopy(case.pipe), patched)


def pickled(case: Case) -> None:
    """A round trip through the pickle module; attngen itself neither writes nor reads pickles."""
    patched = case.patched()
    _copied(case, pickle.loads(pickle.dumps(case.pipe)), patched)


def saved_while_patched(case: Case) -> None:
    """The folder is that of the stock pipeline, and loads as one."""
    case.pipe.save_pretrained(case.folder / "stock")
    case.clean = snapshots(case.pipe)  # diffusers itself notes its version in the configuration
    patched = case.patched()
    case.pipe.save_pretrained(case.folder / "patched")
    attngen.remove(case.pipe)
    assert _content(case.folder / "patched") == _content(case.folder / "stock")
    again = type(case.pipe).from_pretrained(case.folder / "patched", **_none(case))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(case.draw(again), case.exact)
    # Tensors of a file do not lie where allocated ones do, and products of matrices round by where they lie.
    again = copy.deepcopy(again)
    case.apply(again)
    assert torch.equal(case.draw(again), patched)
    case.assert_restored()


def _none(case: Case) -> dict[str, Any]:
    return {name: None for name in case.kind.encoders} | ({"safety_checker": None} if case.kind.options else {})


def _content(folder: Path) -> dict[str, Any]:
    """Every file of a folder: tensors by name, JSON as it is."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert file.suffix in (".json", ".safetensors"), file
        if file.suffix == ".json":
            found[str(file.relative_to(folder))] = json.loads(file.read_text())
            continue
        with safe_open(file, "pt") as opened:
            found[str(file.relative_to(folder))] = {k: opened.get_tensor(k).tolist() for k in opened.keys()}
    assert found
    return found


def _add_lora(case: Case) -> bool:
    from peft import LoraConfig

    models = [model for model in denoisers(case.pipe).values() if hasattr(model, "add_adapter")]
    for model in models:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="lora")
    return bool(models)


def lora_before_and_after(case: Case) -> None:
    patched = case.patched()
    if not _add_lora(case):  # diffusers has none for DiT and PixArt
        attngen.remove(case.pipe)
        return case.assert_restored()
    after = case.draw()
    attngen.remove(case.pipe)
    stock, clean = case.draw(), snapshots(case.pipe)
    assert not torch.equal(stock, case.exact)
    case.apply()  # now the LoRA was there before
    assert torch.equal(case.draw(), after)
    assert not torch.equal(after, patched)
    attngen.remove(case.pipe)
    assert snapshots(case.pipe) == clean and torch.equal(case.draw(), stock)
    case.apply()
    for model in denoisers(case.pipe).values():
        if hasattr(model, "delete_adapters"):
            model.delete_adapters("lora")
    assert torch.equal(case.draw(), patched)
    attngen.remove(case.pipe)
    assert torch.equal(case.draw(), case.exact)


def dtype_moves(case: Case) -> None:
    stock = case.kind.build().to(torch.bfloat16)
    want = case.draw(stock, dtype=torch.bfloat16)
    case.apply(stock)
    patched = case.draw(stock, dtype=torch.bfloat16)
    case.apply()
    case.pipe.to(torch.bfloat16)
    assert torch.equal(case.draw(dtype=torch.bfloat16), patched)
    assert torch.isfinite(patched).all()
    attngen.remove(case.pipe)
    assert torch.equal(case.draw(dtype=torch.bfloat16), want)
    case.pipe.to(torch.float16).to(torch.float32)
    assert snapshots(case.pipe) == case.clean


def device_moves(case: Case) -> None:
    """To an accelerator and back where there is one, else through the meta device, which has no numbers."""
    patched = case.patched()
    if torch.cuda.is_available():
        case.pipe.to("cuda")
        assert torch.isfinite(case.draw()).all()
        case.pipe.to("cpu")
        assert torch.equal(case.draw(), patched)
    else:
        for model in denoisers(case.pipe).values():
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.to("meta")
            model.to_empty(device="cpu").load_state_dict(state)
            for name, value in _buffers(case.name, model).items():
                model.get_buffer(name).copy_(value)
        assert torch.equal(case.draw(), patched)
    attngen.remove(case.pipe)
    case.assert_restored()


def _buffers(name: str, model: Any) -> dict[str, Tensor]:
    """Buffers that no state dict holds, from a pipeline that kept them."""
    for other in denoisers(KINDS[name].build()).values():
        if type(other) is type(model):
            return dict(other.named_buffers())
    raise AssertionError(type(model))


def _offload(pipe: Any, how: str) -> None:
    """By whole models as accelerate does it, or by layers as diffusers does; sequentially: `tests/hosts`."""
    cpu = torch.device("cpu")
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
        return
    for model in denoisers(pipe).values():
        if getattr(model, "_supports_group_offloading", True):
            model.enable_group_offload(cpu, cpu, offload_type="leaf_level")


def offloading(case: Case) -> None:
    """Before and after the patch."""
    patched = case.patched()
    attngen.remove(case.pipe)
    for how, before in itertools.product(("model", "group"), (False, True)):
        pipe = case.kind.build()
        if before:
            _offload(pipe, how)
        case.apply(pipe)
        if not before:
            _offload(pipe, how)
        # Projections that are brought from elsewhere when called cannot be absorbed: another order of sums.
        assert (case.draw(pipe) - patched).abs().max() <= 1e-4, (how, before)
        attngen.remove(pipe)
        assert torch.equal(case.draw(pipe), case.exact), (how, before)
    case.assert_restored()


def compiled_before_and_after(case: Case) -> None:
    patched = case.patched()
    attngen.remove(case.pipe)
    for before in (False, True):
        torch._dynamo.reset()
        pipe = case.kind.build()
        if not before:
            case.apply(pipe)
        for model in denoisers(pipe).values():
            model.compile(backend="eager")
        if before:
            case.apply(pipe)
        assert (case.draw(pipe) - patched).abs().max() <= 1e-4, before
        attngen.remove(pipe)
        assert (case.draw(pipe) - case.exact).abs().max() <= 1e-5, before
    torch._dynamo.reset()
    case.assert_restored()


def fused_and_sliced(case: Case) -> None:
    """diffusers' own changes of processors before the patch come back after it."""
    for name in ("fuse_qkv_projections", "enable_attention_slicing"):
        pipe = case.kind.build()
        change = getattr(pipe, name, None)
        models = list(denoisers(pipe).values())
        if name == "fuse_qkv_projections" and change is None:
            changes = [getattr(model, name) for model in models if hasattr(model, name)]
        else:
            changes = [] if change is None else [change]
        if not changes:
            continue
        for function in changes:
            function()
        stock, clean = case.draw(pipe), snapshots(pipe)
        with attngen.apply(pipe, AGENTS if case.kind.host == "flux" else case.method):
            assert torch.isfinite(case.draw(pipe)).all()
        assert snapshots(pipe) == clean and torch.equal(case.draw(pipe), stock)
    case.assert_restored()


ACTIONS = {
    function.__name__: function
    for function in (
        apply_and_remove,
        twice,
        switch,
        exception_at_each_call,
        exception_inside_with,
        cancel_by_callback,
        deepcopied,
        pickled,
        saved_while_patched,
        lora_before_and_after,
        dtype_moves,
        device_moves,
        offloading,
        fused_and_sliced,
        compiled_before_and_after,
    )
}
