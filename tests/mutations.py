"""The faults of `python -m tests.mutation`: what is replaced by what, and which tests must notice.

A fault names an object, not its source, so that code can be rewritten without it. One table, and so one file.
"""

from __future__ import annotations

import contextlib
import math
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Change = Callable[[Any], Any]
"""What stands in the code -> what is put in its place."""


class Fault(NamedTuple):
    """One fault.

    Attributes:
        target: "module:name" or "module:Class.name". A module as target, "module:torch", is replaced in that module
            alone; anything else in every module and table of the project that holds it.
        change: makes the replacement of the original; a property or class method is given as it stands in its class.
        tests: pytest's names of the tests that should notice.
        only: pytest's -k, where few of their cases can.
    """

    target: str
    change: Change
    tests: tuple[str, ...]
    only: str = ""


def with_function(name: str, change: Change) -> Change:
    """A change of a module: one function of it is replaced."""

    def of(module: types.ModuleType) -> types.ModuleType:
        broken = types.ModuleType(module.__name__)
        vars(broken).update(vars(module))
        setattr(broken, name, change(getattr(module, name)))
        return broken

    return of


def called_with(name: str, **fixed: Any) -> Change:
    """A change of a module: keyword arguments of one of its functions are replaced in every call."""
    return with_function(name, lambda original: lambda *args, **kwargs: original(*args, **{**kwargs, **fixed}))


def nothing(*args: Any, **kwargs: Any) -> None:
    """Put in the place of a check."""


def _pooled_transposed(original: Any) -> Any:
    return lambda x, grid, size: original(x, grid, size).unflatten(1, size).transpose(1, 2).flatten(1, 2)


def _half_scores(original: Any) -> Any:
    def attention(query, key, value, scale, bias=None):
        scores = query @ key.mT * scale if bias is None else query @ key.mT * scale + bias
        return (scores.softmax(-1) @ value).to(value.dtype)

    return attention


def _draws_transposed(original: Any) -> Any:
    def split(grid, stride, draws, device):
        if draws is not None:
            draws = draws % stride[0] * stride[1] + draws // stride[0]
        return original(grid, stride, draws, device)

    return split


def _merged_twice(original: Any) -> Any:
    def merge(self, x):
        kept = len(self.source) - self.num_merged
        merged = original(self, x)
        return torch.cat([merged[:, :kept], 2 * merged[:, kept:]], dim=1) if self.num_merged else merged

    return merge


def _one_more(original: Any) -> Any:
    return lambda grid, stride, ratio: min(original(grid, stride, 1.0), original(grid, stride, ratio) + 1)


def _level_of_one(original: Any) -> Any:
    def observe(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.level = min(self.level, 1)
        return self.level

    return observe


def _last_pattern(original: Any) -> Any:
    return lambda self, layer: original(types.SimpleNamespace(layers=dict(reversed(self.layers.items()))), layer)


def _any_version(original: Any) -> Any:
    def from_dict(cls, data):
        return original.__func__(cls, {**data, "version": 1} if isinstance(data, Mapping) else data)

    return classmethod(from_dict)


def _in_place(original: Any) -> Any:
    def write_whole(path, write):
        with open(path, "wb") as file:
            write(file)

    return write_whole


def _own_mode(original: Any) -> Any:
    def write_whole(path, write):
        original(path, write)
        os.chmod(path, 0o600)

    return write_whole


def _patches_transposed(original: Any) -> Any:
    def unpatchify(self, patches, grid):
        side = self.config["patch_size"]
        return original(self, patches.unflatten(2, (side, side, -1)).transpose(2, 3).flatten(2), grid)

    return unpatchify


def _dropped_to_first(original: Any) -> Any:
    def condition(self, hidden_states, timestep, labels, drop):
        if drop is None and self.training:
            drop = torch.rand(len(hidden_states)) < self.config["class_dropout_prob"]
        if drop is not None and labels is not None:
            labels = labels.masked_fill(drop, 0)
        return original(self, hidden_states, timestep, labels, torch.zeros(len(hidden_states), dtype=torch.bool))

    return condition


def _not_negated(original: Any) -> Any:
    def predict(self, *args):
        output = original(self, *args)
        return output if self._is_dit or type(self.scheduler).__name__ == "InterpolantScheduler" else -output

    return predict


def _inner_hooks_stay(original: Any) -> Any:
    def remove_hooks(model):
        from attngen.hosts.hooks import add_hook

        removed = original(model)
        for module, hook in removed:
            if module is not model:
                add_hook(module, hook)
        return removed

    return remove_hooks


def _attribute_stays(original: Any) -> Any:
    def detach(model):
        detached = original(model)
        for attn, _, spec, _ in detached.layers:
            attn.attngen = spec
        return detached

    return detach


def _new_processor(original: Any) -> Any:
    def detach(model):
        detached = original(model)
        for attn, _, spec, _ in detached.layers:
            attn.set_processor(type(spec.original)())
        return detached

    return detach


def _paused_for_ever(original: Any) -> Any:
    @contextlib.contextmanager
    def paused(self):
        from attngen.hosts.hooks import root_hook

        for model in self._models.values():
            hook = root_hook(model)
            assert hook is not None
            hook.paused = True
        yield

    return paused


def _refusing_all_but(reason: str) -> Change:
    def of(original):
        def why_refused(*args):
            found = original(*args)
            return None if found is not None and reason in found else found

        return why_refused

    return of


def _without(name: str, value: Any) -> Change:
    """A processor that sees its layer without an option."""

    def of(original):
        def call(self, attn, *args, **kwargs):
            before = getattr(attn, name)
            setattr(attn, name, value)
            try:
                return original(self, attn, *args, **kwargs)
            finally:
                setattr(attn, name, before)

        return call

    return of


def _without_mask(original: Any) -> Any:
    def call(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        return original(self, attn, hidden_states, encoder_hidden_states, None, *args, **kwargs)

    return call


def _global_draws(original: Any) -> Any:
    return lambda self, grid, times, device: torch.randint(2**31 - 1, (grid[0] * grid[1],)).to(device)


def _callers_dictionary(original: Any) -> Any:
    def call(self, model, args, kwargs):
        given = self.channel.get(args, kwargs)
        args, kwargs = original(self, model, args, kwargs)
        if given is not None:
            given.update(self.channel.get(args, kwargs))
        return args, kwargs

    return call


def _kept_latents(original: Any) -> Any:
    def call(self, model, args, kwargs):
        self.kept = self.sample.get(args, kwargs)
        return original(self, model, args, kwargs)

    return call


def _with_counts(change: Any) -> Any:
    def changed(original: Any) -> Any:
        def call(*sizes, device):
            rows, counts = original(*sizes, device=device)
            return rows, change(counts)

        return call

    return changed


def _rows_off(original: Any) -> Any:
    def call(grid, *sizes, device):
        rows, counts = original(grid, *sizes, device=device)
        tokens = math.prod(grid)
        return (rows + 1).minimum(rows.clamp(min=tokens - 1)), counts

    return call


_AGENTS = ("tests/methods/test_agent.py::test_agent_attention_equals_oracle",)
_LINEAR = ("tests/methods/test_linear.py::test_linear_attention_equals_oracle",)
_MERGING = (
    "tests/methods/test_matching.py::test_golden_agentsd_merge",
    "tests/methods/test_matching.py::test_match_tokens_equals_oracle",
)
_FOCAL = ("tests/methods/test_focal.py::test_focal_attention_equals_oracle",)
_TILES = ("tests/methods/test_tiles.py::test_tile_attention_equals_oracle",)
_PATHS = ("tests/kernels/test_dispatch.py::test_every_path_has_the_same_numbers",)
_UNET = ("tests/hosts/test_unet.py",)
_GOLDEN_SIT = ("tests/sit/test_model.py::test_golden_models",)
_SAMPLING = ("tests/sit/test_scheduler.py::test_sampling_equals_the_reference",)
_GUIDANCE = ("tests/sit/test_pipeline.py::test_guidance_of_all_channels_is_the_formula",)
_FILES = ("tests/promises/test_files.py::test_files_are_written_whole_and_readable_by_all",)

_PATCH = "tests/test_patch.py::"
_AROUND = ("tests/promises/test_patching.py::test_what_a_layer_does_around_its_attention_stays",)
_SWITCH = (f"{_PATCH}test_applying_again_and_switching_methods",)
_APPLY = (f"{_PATCH}test_apply_and_remove",)

FAULTS = {
    # Tokens and checks
    "pooling swaps the axes": Fault(
        "attngen.tokens:pool_tokens", _pooled_transposed, ("tests/test_tokens.py::test_pool_tokens_equals_oracle",)
    ),
    "the wrong keys are kept": Fault(
        "attngen.tokens:F",
        called_with("interpolate", mode="nearest"),
        ("tests/test_tokens.py::test_downsample_tokens_equals_oracle",),
    ),
    "heads of any size": Fault(
        "attngen.checks:check_heads",
        lambda original: nothing,
        ("tests/test_checks.py::test_attention_names_sizes_that_do_not_fit",),
    ),
    "tokens of any grid": Fault(
        "attngen.checks:check_tokens",
        lambda original: nothing,
        ("tests/test_checks.py::test_token_functions_name_sizes_that_do_not_fit",),
    ),
    # Kernels
    "softmax without its scale": Fault(
        "attngen.kernels.sdpa:F", called_with("scaled_dot_product_attention", scale=None), _AGENTS
    ),
    "a bias is ignored": Fault(
        "attngen.kernels.sdpa:F", called_with("scaled_dot_product_attention", attn_mask=None), _AGENTS
    ),
    "the reference without its scale": Fault(
        "attngen.kernels.reference:softmax_attention",
        lambda original: lambda query, key, value, scale, bias=None: original(query, key, value, 1.0, bias),
        _PATHS,
    ),
    "the reference ignores a bias": Fault(
        "attngen.kernels.reference:softmax_attention",
        lambda original: lambda query, key, value, scale, bias=None: original(query, key, value, scale),
        _PATHS,
    ),
    "scores in half precision": Fault(
        "attngen.kernels.reference:softmax_attention",
        _half_scores,
        ("tests/promises/test_numbers.py::test_every_path_at_scores_of_a_million",),
    ),
    "no shortcut in any kernel": Fault(
        "attngen.kernels.reference:add_branches",
        lambda original: lambda output, value, shortcut, convolution: original(output, value, 0.0, convolution),
        _AGENTS,
    ),
    # Methods
    "tiles are chosen by their means alone": Fault(
        "attngen.methods.tiles:SPREAD",
        lambda original: 0.0,
        ("tests/methods/test_tiles.py::test_a_tile_of_large_spread_is_chosen_before_one_of_larger_mean",),
    ),
    "empty slots of a tile are keys": Fault("attngen.methods.tiles:NOTHING", lambda original: 0.0, _TILES),
    "one scale for both softmaxes": Fault(
        "attngen.methods.agent:scales_for",
        lambda original: lambda head_dim, exponent, shortcut: original(head_dim, 1.0, shortcut),
        _UNET,
    ),
    "no shortcut": Fault(
        "attngen.methods.agent:scales_for",
        lambda original: lambda head_dim, exponent, shortcut: original(head_dim, exponent, 0.0),
        _UNET,
    ),
    "too many agents": Fault(
        "attngen.methods.agent:AgentAttention.why_exact",
        lambda original: nothing,
        ("tests/test_patch.py::test_apply_and_remove",),
        only="too-many-agents",
    ),
    "elu without one": Fault("attngen.methods.linear:_elu", lambda original: lambda x: original(x) - 1, _LINEAR),
    "focused by another power": Fault(
        "attngen.methods.linear:focused_feature_map",
        lambda original: lambda x, factor=3: original(x, factor + 1),
        _LINEAR,
    ),
    "merged tokens count twice": Fault("attngen.methods.matching:TokenMatching.merge", _merged_twice, _MERGING),
    "the least alike merge": Fault(
        "attngen.methods.matching:_nearest",
        lambda original: lambda *args: (-original(*args)[0], original(*args)[1]),
        _MERGING,
    ),
    "rows and columns of a cell": Fault(
        "attngen.methods.matching:_split",
        _draws_transposed,
        ("tests/methods/test_matching.py::test_random_targets_equal_tomesd",),
    ),
    "merged tokens lose digits": Fault(
        "attngen.methods.matching:torch",
        with_function("promote_types", lambda original: lambda dtype, other: dtype),
        ("tests/methods/test_matching.py::test_thousands_of_tokens_merge_into_one",),
    ),
    "one token too many merges": Fault(
        "attngen.methods.matching:merged_count",
        lambda original: (
            lambda grid, stride, ratio: min(original(grid, stride, 1.0), original(grid, stride, ratio) + 1)
        ),
        ("tests/methods/test_matching.py::test_match_counts",),
    ),
    "cells count once": Fault("attngen.methods.focal:_rows", _with_counts(lambda counts: counts.clamp(max=1)), _FOCAL),
    "cells count what is seen already": Fault(
        "attngen.methods.focal:_rows", _with_counts(lambda counts: counts.clamp(min=1)), _FOCAL
    ),
    "regions are a token off": Fault("attngen.methods.focal:_rows", _rows_off, _FOCAL),
    "half precision rounds the counts": Fault(
        "attngen.methods.focal:_rows",
        _with_counts(lambda counts: counts.log().bfloat16().double().exp()),
        ("tests/methods/test_focal.py::test_the_count_of_a_cell_is_exact_in_half_precision",),
    ),
    # The patch
    "a hook stays": Fault("attngen.hosts.hooks:remove_hooks", _inner_hooks_stay, _APPLY),
    "an attribute stays": Fault("attngen.hosts.install:detach", _attribute_stays, _APPLY),
    "the processor is made anew": Fault("attngen.hosts.install:detach", _new_processor, _APPLY),
    "learned weights stay": Fault(
        "attngen.learned.modules:drop_core",
        lambda original: lambda attn: None,
        ("tests/learned/test_modules.py::test_nothing_of_it_shows_or_stays",),
    ),
    "an old handle removes the new patch": Fault(
        "attngen.patch:AttentionPatch._is_on", lambda original: lambda self, model: True, _SWITCH
    ),
    "no removal at the end of with": Fault(
        "attngen.patch:AttentionPatch.__exit__",
        lambda original: nothing,
        (f"{_PATCH}test_undone_after_an_exception_in_any_call",),
    ),
    "a pause that stays": Fault(
        "attngen.patch:AttentionPatch.paused",
        _paused_for_ever,
        ("tests/learned/test_modules.py::test_paused_is_exact_and_reapply_brings_the_same_weights_back",),
    ),
    "patterns that match nothing": Fault(
        "attngen.patch:_check_patterns",
        lambda original: nothing,
        (f"{_PATCH}test_a_pattern_that_matches_no_layer_is_not_silent",),
    ),
    "cross-attention is patched": Fault(
        "attngen.hosts.install:_why_refused",
        _refusing_all_but("cross-attention stays exact"),
        (f"{_PATCH}test_every_layer_is_reached",),
    ),
    "custom processors are replaced": Fault(
        "attngen.hosts.install:_why_refused",
        _refusing_all_but("is not a plain one"),
        ("tests/hosts/test_integrations.py::test_a_custom_processor_is_left_alone",),
    ),
    "an attention mask is ignored": Fault(
        "attngen.hosts.image:AttnGenProcessor.__call__",
        _without_mask,
        ("tests/promises/test_patching.py::test_a_mask_of_attention_is_obeyed_in_a_call_of_the_model",),
    ),
    "the norm before a layer is forgotten": Fault(
        "attngen.hosts.image:_normalised", lambda original: lambda attn, hidden_states, temb: hidden_states, _AROUND
    ),
    "the residual is forgotten": Fault(
        "attngen.hosts.image:AttnGenProcessor.__call__", _without("residual_connection", False), _AROUND
    ),
    "the scale of the output is forgotten": Fault(
        "attngen.hosts.image:AttnGenProcessor.__call__", _without("rescale_output_factor", 1.0), _AROUND
    ),
    "similarity of the wrong tokens": Fault(
        "attngen.hosts.hooks:MetricHook.refine",
        lambda original: lambda self, call, hidden_states: call,
        ("tests/hosts/test_unet.py::test_tome_gives_the_numbers_of_tomesd",),
    ),
    "the clock runs backwards": Fault(
        "attngen.hosts.clock:Clock.time",
        lambda original: lambda self, *args: 1.0 - original(self, *args),
        (f"{_PATCH}test_stages_by_time",),
    ),
    "draws depend on the time alone": Fault(
        "attngen.hosts.hooks:RootHook._draws",
        lambda original: lambda self, *args: original(types.SimpleNamespace(seed=0), *args),
        (f"{_PATCH}test_random_merging_depends_on_seed_and_time_alone",),
    ),
    "draws of the global generator": Fault(
        "attngen.hosts.hooks:RootHook._draws",
        _global_draws,
        (f"{_PATCH}test_the_global_random_state_is_neither_read_nor_changed",),
    ),
    "the caller's dictionary is changed": Fault(
        "attngen.hosts.hooks:RootHook.__call__",
        _callers_dictionary,
        (f"{_PATCH}test_the_callers_arguments_are_not_changed",),
    ),
    "nothing is said of replaced processors": Fault(
        "attngen.hosts.hooks:RootHook._replacement",
        lambda original: nothing,
        ("tests/hosts/test_integrations.py::test_slicing_is_noticed_and_mended",),
    ),
    "stages of a batch are mixed": Fault(
        "attngen.hosts.hooks:RootHook._stage",
        lambda original: lambda self, times: original(self, times[:1]),
        (f"{_PATCH}test_mixed_stages_in_a_batch_are_refused",),
    ),
    "a hook keeps the latents": Fault(
        "attngen.hosts.hooks:RootHook.__call__",
        _kept_latents,
        ("tests/promises/test_machines.py::test_out_of_memory_in_a_step",),
    ),
    # Plans and schedules
    "the last pattern decides": Fault(
        "attngen.plan:Stage.method_for",
        _last_pattern,
        ("tests/test_plan.py::test_the_first_pattern_that_matches_decides_in_each_stage",),
    ),
    "plans of any version": Fault(
        "attngen.plan:Plan.from_dict",
        _any_version,
        ("tests/test_plan.py::test_bad_files_name_themselves_and_the_value",),
    ),
    "stages start too late": Fault(
        "attngen.schedule:stage_at",
        lambda original: lambda starts, time: original(starts, math.nextafter(time, 2.0)),
        ("tests/test_schedule.py",),
    ),
    "the level stops at one": Fault(
        "attngen.schedule:ChangeSchedule.observe", _level_of_one, ("tests/test_schedule.py",)
    ),
    # Learned layers
    "a learned map is ignored": Fault(
        "attngen.learned.modules:HeadMap.forward",
        lambda original: lambda self, x: x,
        (
            "tests/learned/test_methods.py::test_mediators_against_the_formula",
            "tests/learned/test_methods.py::test_linear_attention_against_the_formula",
        ),
    ),
    "features of one sign": Fault(
        "attngen.learned.modules:hedgehog_features",
        lambda original: lambda x: original(x).unflatten(-1, (2, -1))[..., [0, 0], :].flatten(-2),
        ("tests/learned/test_methods.py::test_linear_attention_against_the_formula",),
    ),
    "learned weights do not move": Fault(
        "attngen.learned.modules:HiddenModule._apply",
        lambda original: lambda self, fn, recurse=True: self,
        ("tests/learned/test_modules.py::test_moves_reach_the_weights",),
    ),
    "learned weights of any shape": Fault(
        "attngen.learned.file:check_weights",
        lambda original: nothing,
        ("tests/learned/test_file.py::test_a_file_that_is_wrong_is_named",),
    ),
    # SiT and its scheduler
    "shift and scale change places": Fault(
        "attngen.sit.model:_modulate", lambda original: lambda x, shift, scale: original(x, scale, shift), _GOLDEN_SIT
    ),
    "rows and columns of the position": Fault(
        "attngen.sit.model:position_embedding",
        lambda original: lambda *args: torch.cat(original(*args).chunk(2, dim=-1)[::-1], dim=-1),
        _GOLDEN_SIT,
    ),
    "patches are put back transposed": Fault(
        "attngen.sit.model:SiTTransformer2DModel._unpatchify", _patches_transposed, _GOLDEN_SIT
    ),
    "labels are dropped for the wrong class": Fault(
        "attngen.sit.model:SiTTransformer2DModel._condition",
        _dropped_to_first,
        ("tests/sit/test_model.py::test_label_dropout_in_training_and_gradient_of_the_null_class",),
    ),
    "guidance of one time more": Fault(
        "attngen.sit.classes:ClassPipeline.guidance_scale",
        lambda original: property(lambda self: self._guidance_scale + 1),
        _GUIDANCE,
    ),
    "the null class last": Fault(
        "attngen.sit.pipeline:torch",
        with_function(
            "cat", lambda original: lambda parts, dim=0: original(parts[::-1] if parts[0].ndim == 1 else parts, dim)
        ),
        _GUIDANCE,
    ),
    "the noise of the SDE is too small": Fault(
        "attngen.sit.calls:torch", with_function("sqrt", lambda original: lambda x: original(x / 2)), _SAMPLING
    ),
    "the last step keeps the drift": Fault(
        "attngen.sit.calls:_last_call",
        lambda original: lambda config, t, drift, data, velocity: original(config, t, drift, data, drift),
        _SAMPLING,
    ),
    "the path ends before the data": Fault(
        "attngen.sit.paths:gvp_path",
        lambda original: lambda t: original(t.clamp(max=0.999)),
        ("tests/sit/test_scheduler.py::test_path_goes_from_noise_to_data",),
    ),
    "a black picture is written": Fault(
        "attngen.sit.classes:ClassPipeline._decode",
        lambda original: lambda self, latents, output_type: original(self, latents.nan_to_num(), output_type),
        ("tests/sit/test_pipeline.py::test_nan_is_no_picture",),
    ),
    "a picture of a broken VAE is written": Fault(
        "attngen.sit.pipeline:torch",
        with_function("isfinite", lambda original: lambda x: torch.ones((), dtype=torch.bool)),
        ("tests/sit/test_pipeline.py::test_nan_from_the_vae_is_no_picture",),
    ),
    "the sign of flow matching": Fault(
        "attngen.sit.pipeline:SiTPipeline._predict",
        _not_negated,
        ("tests/sit/test_pipeline.py::test_flow_matching_euler_is_the_euler_ode",),
    ),
    # Files
    "a plan is written in place": Fault("attngen.files:write_whole", _in_place, _FILES),
    "files that only their owner reads": Fault("attngen.files:write_whole", _own_mode, _FILES),
    "pickles without a flag": Fault(
        "attngen.sit.checkpoints:_read_file",
        lambda original: lambda path, allow_pickle: original(path, True),
        ("tests/sit/test_model.py::test_checkpoints_from_files",),
    ),
    "pickles of anything": Fault(
        "attngen.sit.checkpoints:torch",
        called_with("load", weights_only=False),
        ("tests/promises/test_files.py::test_pickles_are_never_run",),
    ),
    "a checkpoint without its mark": Fault(
        "train.loop.checkpoint:list_checkpoints",
        lambda original: lambda folder: sorted(folder.iterdir()),
        ("tests/train/test_sit_training.py::test_checkpoints_are_whole_or_absent",),
    ),
}
"""Name of the fault -> what it is."""

LATER = {
    # Joint attention and the rows of models
    "the norm of the keys is forgotten": (
        "joint attention leaves out norm_k",
        "tests/hosts/test_transformers.py::test_sd3_layers_by_definition",
    ),
    "text queries see the image alone": (
        "joint attention leaves the text out of the keys",
        "tests/hosts/test_transformers.py::test_text_queries_stay_exact",
    ),
    "agents are not rotated": (
        "agents get no rotary position",
        "tests/hosts/test_transformers.py::test_flux_layers_by_definition",
    ),
    "rotation the other way": (
        "rotary positions turn by the negative angle",
        "tests/hosts/test_transformers.py::test_flux_layers_by_definition",
    ),
    "text and image change places": (
        "the output has the image before the text",
        "tests/hosts/test_transformers.py::test_flux_layers_by_definition",
    ),
    "height and width change places": (
        "the latents' grid is (width, height)",
        "tests/hosts/test_transformers.py::test_every_layer_gets_the_grid",
    ),
    # The patch
    "another pipeline's patch is replaced": (
        "no warning where a shared model was patched through another pipeline",
        "tests/promises/test_sharing.py",
    ),
}
"""Name of a fault that is still to be written -> what is broken, and the test that should notice."""
