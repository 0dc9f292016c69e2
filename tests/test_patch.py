"""`apply` and its handle: what is refused, what is undone, what is said. The numbers are in `tests/hosts`."""

import copy
import gc
import json
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import attngen
from attngen import (
    PRESETS,
    AgentAttention,
    AttnGenWarning,
    ChangeSchedule,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    Plan,
    SoftmaxAttention,
    Stage,
    TokenMerging,
)
from tests.builders.hosts import ACTIVE, EXACT, HOSTS, TEXT, fresh, normal, self_attention, snapshot
from tests.cases import share

AGENTS = ACTIVE["agents"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.fixture
def model(host):
    return fresh(next(name for name, candidate in HOSTS.items() if candidate is host))


def stock_output(host, _cache={}, **kwargs):  # noqa: B006
    key = (id(host), repr(kwargs))
    if key not in _cache:
        name = next(name for name, candidate in HOSTS.items() if candidate is host)
        _cache[key] = host(fresh(name), **kwargs)
    return _cache[key]


class Failure(Exception):
    pass


# Every method on every model


def ignore_cost():
    return warnings.catch_warnings(action="ignore", category=AttnGenWarning)


METHODS = {**{f"preset-{name}": name for name in PRESETS}, **ACTIVE, **EXACT}


@pytest.mark.parametrize(("host", "method"), share(2, HOSTS, METHODS))
def test_apply_and_remove(host, model, method):
    exact, clean = stock_output(host), snapshot(model)
    with ignore_cost():
        handle = attngen.apply(model, method)
        assert handle.is_applied
        patched = host(model)
        again = host(model)
    assert patched.shape == exact.shape and patched.dtype == exact.dtype
    assert torch.isfinite(patched).all()
    assert torch.equal(patched, again)
    active = any(layer.is_active for layer in handle.report().layers)
    assert torch.equal(patched, exact) == (not active)
    if method == "softmax" or method in EXACT.values():
        assert not active
    elif method in ACTIVE.values():
        assert active == (not (host.rotary and isinstance(method, (FocalAttention, LinearAttention))))
    assert list(model.state_dict()) == clean["state"]
    handle.remove()
    assert not handle.is_applied
    assert snapshot(model) == clean
    assert torch.equal(host(model), exact)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_where_they_are_active(name):
    """At the sizes above most presets are exact by their least number of tokens; here each does what it is for."""
    host, model, size = HOSTS["sd15"], fresh("sd15"), (32, 32)
    exact = {time: host(model, size, time, batch=1) for time in (0.9, 0.3)}
    with ignore_cost(), attngen.apply(model, name) as handle:
        for time, stock in exact.items():
            out = host(model, size, time, batch=1)
            assert torch.isfinite(out).all()
            assert torch.equal(out, stock) == (name == "softmax")
        active = [layer for layer in handle.report().layers if layer.is_active]
    assert bool(active) == (name != "softmax")
    assert torch.equal(host(model, size, 0.3, batch=1), exact[0.3])


def test_every_layer_is_reached(host, model):
    seen = []
    with attngen.apply(model, AGENTS) as handle:
        assert {layer.name for layer in handle.report().patched} == set(self_attention(model))
        for name, layer in self_attention(model).items():
            layer.to_q.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        host(model)
    assert set(seen) == set(self_attention(model))


# Undoing


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "sit"])
def test_undone_after_an_exception_in_any_call(name):
    host, model = HOSTS[name], fresh(name)
    exact, clean = host(model), snapshot(model)
    attentions = [module for module in model.modules() if hasattr(module, "set_processor")]
    for k, attention in enumerate(attentions):
        handle = attngen.apply(model, AGENTS)
        patched = host(model)
        target = attention.to_v

        def fail(*_):
            raise Failure

        hook = target.register_forward_pre_hook(fail)
        with pytest.raises(Failure):
            host(model)
        hook.remove()
        assert torch.equal(host(model), patched), k
        handle.remove()
        assert snapshot(model) == clean
        assert torch.equal(host(model), exact)
    with pytest.raises(Failure), attngen.apply(model, AGENTS):
        raise Failure
    assert snapshot(model) == clean


def test_applying_again_and_switching_methods(host, model):
    clean, methods = snapshot(model), [AGENTS, AGENTS, ACTIVE["merging"], "softmax", ACTIVE["downsampled"]]
    outputs, handles = [], []
    for method in methods:
        handles.append(attngen.apply(model, method))
        assert [handle.is_applied for handle in handles] == [False] * (len(handles) - 1) + [True]
        outputs.append(host(model))
        with attngen.apply(fresh(next(n for n, h in HOSTS.items() if h is host)), method) as alone:
            assert torch.equal(host(alone._models[""]), outputs[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[3], stock_output(host))
    for handle in handles[:-1]:
        handle.remove()  # replaced already: leaves the last one alone
    assert torch.equal(host(model), outputs[-1])
    handles[-1].remove()
    handles[-1].remove()
    attngen.remove(model)
    assert snapshot(model) == clean
    assert torch.equal(host(model), stock_output(host))


def test_remove_by_function_and_on_a_model_never_patched(host, model):
    clean = snapshot(model)
    attngen.remove(model)
    assert snapshot(model) == clean
    handle = attngen.apply(model, AGENTS)
    attngen.remove(model)
    assert not handle.is_applied and snapshot(model) == clean
    handle.remove()
    assert snapshot(model) == clean
    handle.reapply()
    assert handle.is_applied and not torch.equal(host(model), stock_output(host))
    handle.remove()
    assert snapshot(model) == clean


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "sit"])
def test_many_rounds_leave_nothing(name):
    model = fresh(name)
    clean = snapshot(model)
    for _ in range(20):
        attngen.apply(model, AGENTS)
        attngen.apply(model, "tome").remove()
    assert snapshot(model) == clean


def test_processors_of_ours_left_by_another_tool_do_not_break_the_next_apply():
    """A tool may keep `attn_processors` while patched and put them back after `remove`."""
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    handle = attngen.apply(model, AGENTS)
    patched, kept = host(model), dict(model.attn_processors)
    handle.remove()
    model.set_attn_processor(kept)
    assert torch.equal(host(model), exact)
    handle = attngen.apply(model, AGENTS)
    assert torch.equal(host(model), patched)
    handle.remove()
    assert torch.equal(host(model), exact)
    attngen.apply(model, "softmax").remove()


def test_the_patch_does_not_keep_a_model_alive():
    model = fresh("dit")
    attngen.apply(model, AGENTS)
    HOSTS["dit"](model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# Copies, files, threads


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize(
    ("host", "method", "copied"),
    share(2, HOSTS, {"agentsd": "agentsd", "random": TokenMerging(0.5, random=True)}, COPIES),
)
def test_copies_are_patched_and_independent(host, model, method, copied):
    exact, clean = stock_output(host), snapshot(model)
    with ignore_cost():
        handle = attngen.apply(model, method, seed=3)
        patched = host(model)
        other = copied(model)
        assert torch.equal(host(other), patched)
        handle.remove()
        assert snapshot(model) == clean
        assert torch.equal(host(other), patched)
    attngen.remove(other)
    assert torch.equal(host(other), exact)
    for name in ("state", "modules", "attributes", "hooks", "config"):
        assert snapshot(other)[name] == clean[name]


def test_a_whole_model_in_a_file(host, model, tmp_path):
    attngen.apply(model, AGENTS)
    patched = host(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(host(again), patched)
    attngen.remove(again)
    assert torch.equal(host(again), stock_output(host))


def test_save_pretrained_while_patched(host, model, tmp_path, caplog):
    attngen.apply(model, AGENTS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "attngen" not in json.dumps({k: v for k, v in config.items() if k != "_class_name"})
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(host(again.eval()), stock_output(host))
    assert not [record for record in caplog.records if "attngen" in record.getMessage()]


def in_threads(tasks):
    results, errors = [None] * len(tasks), []

    def work(i, task):
        try:
            with torch.no_grad():
                results[i] = task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i, task)) for i, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


@pytest.mark.parametrize("name", ["sd15", "flux", "sit"])
def test_threads_on_one_patched_model(name):
    """Grid, stage and draws belong to a call, not to the model."""
    host, model = HOSTS[name], fresh(name)
    plan = Plan((Stage(1.0, {"*": TokenMerging(0.5, random=True)}), Stage(0.5, {"*": AGENTS})))
    attngen.apply(model, plan)
    calls = [(size, time) for size in ((16, 16), (8, 24), (24, 8), (12, 16)) for time in (0.9, 0.1)]
    alone = [host(model, *call) for call in calls]
    together = in_threads([lambda call=call: [host(model, *call) for _ in range(3)] for call in calls])
    for want, got in zip(alone, together, strict=True):
        assert all(torch.equal(want, x) for x in got)


def test_threads_each_patching_its_own_model():
    host, methods = HOSTS["sd15"], list(ACTIVE.values())[:4]
    models = [fresh("sd15") for _ in methods]

    def task(model, method):
        outputs = []
        for _ in range(3):
            with attngen.apply(model, method):
                outputs.append(host(model))
            outputs.append(host(model))
        return outputs

    results = in_threads([lambda m=m, k=k: task(m, k) for m, k in zip(models, methods, strict=True)])
    for method, outputs in zip(methods, results, strict=True):
        with attngen.apply(fresh("sd15"), method) as handle:
            alone = host(handle._models[""])
        assert all(torch.equal(x, alone) for x in outputs[::2])
        assert all(torch.equal(x, stock_output(host)) for x in outputs[1::2])


# Options


def test_min_tokens_overrides_the_plan():
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    with attngen.apply(model, AGENTS, min_tokens=257):
        with pytest.warns(AttnGenWarning, match="below 257 tokens"):
            assert torch.equal(host(model), exact)
    with attngen.apply(model, AGENTS, min_tokens=256) as handle:
        assert not torch.equal(host(model), exact)
        assert {layer.tokens for layer in handle.report().layers if layer.is_active} == {256}
    with attngen.apply(model, "agent", min_tokens=0) as handle, ignore_cost():
        host(model, (32, 32), batch=1)
        assert handle.plan.min_tokens == 0 and PRESETS["agent"].min_tokens == 1024


def test_max_levels_counts_from_the_finest_level_with_attention():
    for name, tokens in (("sd15", {256}), ("sdxl", {64})):
        model = fresh(name)
        with attngen.apply(model, Plan.of(AGENTS, max_levels=1)) as handle:
            HOSTS[name](model)
            assert {layer.tokens for layer in handle.report().layers if layer.is_active} == tokens
        with attngen.apply(model, Plan.of(AGENTS, max_levels=2)) as handle:
            HOSTS[name](model)
            assert {layer.tokens for layer in handle.report().layers if layer.is_active} == {
                t // 4**i for t in tokens for i in (0, 1)
            }


def test_layer_patterns_choose_layers():
    host, model = HOSTS["dit"], fresh("dit")
    first = Plan((Stage(1.0, {"transformer_blocks.0.*": AGENTS}),))
    spied = {}
    for name, layer in self_attention(model).items():
        layer.register_forward_hook(lambda m, a, out, name=name: spied.__setitem__(name, out))
    host(model)
    exact = dict(spied)
    attngen.apply(model, first)
    host(model)
    assert not torch.equal(spied["transformer_blocks.0.attn1"], exact["transformer_blocks.0.attn1"])
    attngen.apply(model, Plan((Stage(1.0, {"transformer_blocks.1.*": AGENTS, "*": SoftmaxAttention()}),)))
    host(model)
    assert torch.equal(spied["transformer_blocks.0.attn1"], exact["transformer_blocks.0.attn1"])
    assert not torch.equal(spied["transformer_blocks.1.attn1"], exact["transformer_blocks.1.attn1"])


def test_a_pattern_that_matches_no_layer_is_not_silent():
    """A plan that changes nothing at all is an error or a warning, not an exact model that looks patched."""
    host, model = HOSTS["dit"], fresh("dit")
    with pytest.raises((ValueError, AttnGenWarning), match="nothing|no layer|match"):
        attngen.apply(model, Plan((Stage(1.0, {"up_block.*": AGENTS}),)))
        host(model)


def test_random_merging_depends_on_seed_and_time_alone():
    host, model = HOSTS["sd15"], fresh("sd15")
    method = TokenMerging(0.5, random=True)

    def draw(seed, time, batch=2):
        with attngen.apply(model, method, seed=seed):
            host(model, time=0.77)  # whatever ran before
            return host(model, time=time, batch=batch)

    one = draw(0, 0.4)
    assert torch.equal(draw(0, 0.4), one)
    assert not torch.equal(draw(1, 0.4), one)
    assert (draw(0, 0.4, batch=1) - one[:1]).abs().max() < 1e-4  # in any batch
    with attngen.apply(model, Plan((Stage(1.0, {"*": method}), Stage(0.5, {"*": method})))):
        times = [host(model, time=time) for time in (0.4, 0.3, 0.4)]
    assert torch.equal(times[0], times[2]) and torch.equal(times[0], one)
    with attngen.apply(model, TokenMerging(0.5)):
        assert not torch.equal(host(model, time=0.4), one)


def test_the_global_random_state_is_neither_read_nor_changed(host, model):
    with torch.random.fork_rng(), attngen.apply(model, TokenMerging(0.5, random=True)):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = host(model)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(host(model), first)


def test_a_plan_file_and_a_path(tmp_path):
    model, plan = fresh("dit"), Plan.of(AGENTS, min_tokens=3)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert attngen.apply(model, path).plan == plan == attngen.apply(model, str(path)).plan


# What is refused, before anything is changed

BAD_METHODS = {
    "unknown name": ("no-such-method", "no-such-method.*softmax, agent, tome, todo, focal, linear, agentsd"),
    "empty name": ("", "known: softmax"),
    "None": (None, "None"),
    "a class": (AgentAttention, "AgentAttention"),
    "a dict": ({"method": "agent"}, "agent"),
    "a number": (3, "3"),
    "a missing file": ("no/such/plan.json", "no/such/plan.json"),
}


@pytest.mark.parametrize(("method", "message"), BAD_METHODS.values(), ids=BAD_METHODS)
@pytest.mark.parametrize("patched", [False, True])
def test_bad_methods(method, message, patched):
    host, model = HOSTS["dit"], fresh("dit")
    if patched:
        attngen.apply(model, AGENTS)
    before, clean = host(model), snapshot(model)
    with pytest.raises(ValueError, match=message):
        attngen.apply(model, method)
    assert snapshot(model) == clean and torch.equal(host(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": -1}, "min_tokens.*-1"),
        ({"min_tokens": 2.5}, "min_tokens.*2.5"),
        ({"min_tokens": True}, "min_tokens.*True"),
        ({"seed": "x"}, "seed.*x"),
        ({"seed": 0.5}, "seed.*0.5"),
        ({"seed": None}, "seed.*None"),
        ({"switch": "x"}, "switch.*x"),
        ({"switch": ChangeSchedule}, "switch"),
    ],
)
def test_bad_options(options, message):
    model = fresh("dit")
    clean = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attngen.apply(model, "agentsd", **options)
    assert snapshot(model) == clean


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1))


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


WRONG = [lambda: nn.Linear(2, 2), lambda: "unet", lambda: None, dict, text_encoder, vae, object]


@pytest.mark.parametrize("make", WRONG)
def test_wrong_targets(make):
    target = make()
    name = type(target).__name__
    with pytest.raises(ValueError, match=f"{name} has no denoiser.*UNet2DConditionModel"):
        attngen.apply(target, "agent")
    attngen.remove(target)  # there is nothing to remove


def test_unet_without_attention():
    import diffusers

    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=TEXT,
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel has no attention layer"):
        attngen.apply(model, "agent")


def test_models_with_learned_attention_are_refused_with_the_reason():
    model = attngen.SiTTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=1, attention_head_dim=8, attention="mediator", num_mediators=4
    )
    with pytest.raises(ValueError, match="SiTMediatorAttnProcessor"):
        attngen.apply(model, "agent")


# What is said


def messages(record):
    return [str(warning.message) for warning in record if issubclass(warning.category, AttnGenWarning)]


def test_a_patch_that_does_nothing_at_this_size_says_so_once():
    host, model = HOSTS["dit"], fresh("dit")
    attngen.apply(model, "agent")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            host(model)
    (message,) = messages(record)
    assert "does nothing" in message and "8 x 8" in message and "DiTTransformer2DModel" in message
    assert "1024" in message


def test_a_method_that_costs_more_says_so_once():
    host, model = HOSTS["dit"], fresh("dit")
    attngen.apply(model, TokenMerging(ratio=0.02))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            host(model)
    (message,) = messages(record)
    assert "costs more" in message and "transformer_blocks" in message


def test_the_warning_points_at_the_caller():
    host, model = HOSTS["dit"], fresh("dit")
    attngen.apply(model, "agent")
    with pytest.warns(AttnGenWarning) as record:
        host(model)
    assert "attngen/hosts" not in record[0].filename.replace("\\", "/")


def test_nothing_is_said_or_printed_where_all_is_well(host, model, caplog, capfd, unmeasured):
    import logging

    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            handle = attngen.apply(model, AGENTS)
            host(model)
            str(handle.report())
            attngen.apply(model, ACTIVE["merging"])
            host(model)
            attngen.apply(model, "softmax")
            host(model)
            handle.reapply()
            attngen.remove(model)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records, caplog.text
    assert capfd.readouterr() == ("", "")


def test_the_callers_arguments_are_not_changed(host, model):
    given = {"scale": 1.0} if host.channel != "cross_attention_kwargs" else {}
    kept = dict(given)
    attngen.apply(model, AGENTS)
    host(model, **{host.channel: given})
    assert given == kept


# Time


PLAN3 = Plan(
    (
        Stage(1.0, {"*": AgentAttention(num_agents=4)}),
        Stage(0.6, {"*": DownsampledKV(2)}),
        Stage(0.2, {"*": SoftmaxAttention()}),
    )
)


MOMENTS = [(1.0, 0), (0.9, 0), (0.61, 0), (0.59, 1), (0.4, 1), (0.21, 1), (0.19, 2), (0.0, 2)]


@pytest.mark.parametrize(("host", "moment"), share(3, HOSTS, MOMENTS))
def test_stages_by_time(host, model, moment):
    """SiT counts from noise to data, FLUX in [0, 1], the others from 999 to 0."""
    time, stage = moment
    with attngen.apply(model, PLAN3):
        got = host(model, time=time)
    with attngen.apply(model, PLAN3.stages[stage].method_for("")):
        assert torch.equal(got, host(model, time=time))


@pytest.mark.parametrize(
    "make", [int, float, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor([t, t])]
)
@pytest.mark.parametrize("by_position", [True, False])
def test_time_and_latents_in_any_form(make, by_position):
    model, latents, text = fresh("sd15"), normal(2, 4, 8, 24), normal(2, 5, TEXT)
    attngen.apply(model, PLAN3)

    def call(t):
        t = make(t)
        if by_position:
            return model(latents, t, text).sample
        return model(sample=latents, timestep=t, encoder_hidden_states=text).sample

    outputs = {t: call(t) for t in (601, 599, 199)}
    for stage, t in enumerate(outputs):
        attngen.apply(model, PLAN3.stages[stage].method_for(""))
        assert torch.equal(call(t), outputs[t])


def test_mixed_stages_in_a_batch_are_refused(host, model):
    attngen.apply(model, PLAN3)
    mixed = torch.cat([host.clock(0.9, 1), host.clock(0.1, 1)])
    with pytest.raises(ValueError, match="2 stages"):
        host.forward(model, normal(2, 4, 16, 16, seed=4), mixed)
    same = torch.cat([host.clock(0.5, 1), host.clock(0.3, 1)])
    assert torch.isfinite(host.forward(model, normal(2, 4, 16, 16, seed=4), same)).all()
    attngen.apply(model, AGENTS)  # one stage: any times
    assert torch.isfinite(host.forward(model, normal(2, 4, 16, 16, seed=4), mixed)).all()


def test_a_time_that_is_not_a_number_is_refused():
    host, model = HOSTS["sd15"], fresh("sd15")
    attngen.apply(model, PLAN3)
    with pytest.raises(ValueError, match="NaN"):
        host(model, time=float("nan"))


def test_the_models_own_message_for_a_missing_argument():
    model = fresh("sit")
    attngen.apply(model, PLAN3)
    with pytest.raises(TypeError, match="missing.*timestep"):
        model(normal(1, 4, 16, 16))
    with pytest.raises(TypeError, match="missing"):
        model()


def test_a_change_schedule_picks_the_stage():
    host, model = HOSTS["sd15"], fresh("sd15")
    switch = ChangeSchedule(warmup=1, ratios=(0.8, 0.5))
    attngen.apply(model, PLAN3, switch=switch)
    for level, latents in ((0, [0.0, 1.0]), (1, [1.7]), (2, [2.0])):
        for value in latents:
            switch.observe(torch.full((1, 2), value))
        got = host(model, time=0.99)
        with attngen.apply(copy.deepcopy(model), PLAN3.stages[level].method_for("")) as handle:
            assert torch.equal(got, host(handle._models[""], time=0.99))


def test_a_change_schedule_with_more_levels_than_stages_stays_in_the_last():
    host, model = HOSTS["dit"], fresh("dit")
    exact = host(model)
    switch = ChangeSchedule(warmup=1, ratios=(0.9, 0.8, 0.7, 0.6))
    attngen.apply(model, PLAN3, switch=switch)
    for value in (0.0, 1.0, 1.1):
        switch.observe(torch.full((1, 2), value))
    assert switch.level == 4
    assert torch.equal(host(model), exact)
