"""The faults of `python -m tests.mutation`: what is broken, how, and which tests must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        file: of the repository.
        old: text that stands in it once.
        new: what stands there instead.
        tests: pytest's names of the tests that should notice.
        only: pytest's -k, where few of their cases can.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str = ""


_PATCH = "tests/test_patch.py::"
_PROMISE = "tests/promises/"
_REFERENCE = "attngen/kernels/reference.py"
_AGENT = "attngen/methods/agent.py"
_FOCAL = "attngen/methods/focal.py"
_FOCAL_TESTS = ("tests/methods/test_focal.py::test_focal_attention_equals_oracle",)
_MATCHING = "attngen/methods/matching.py"
_LINEAR = "attngen/methods/linear.py"
_HOOKS = "attngen/hosts/hooks.py"
_INSTALL = "attngen/hosts/install.py"
_SINGLE = "attngen/hosts/image.py"
_JOINT = "attngen/hosts/joint.py"
_FLUX = "attngen/hosts/flux.py"
_SIT = "attngen/sit/model.py"
_PIPELINE = "attngen/sit/pipeline.py"
_INTERPOLANT = "attngen/sit/scheduler.py"

_PATHS = ("tests/kernels/test_dispatch.py",)
_ORACLE_AGENTS = ("tests/methods/test_agent.py::test_agent_attention_equals_oracle",)
_ORACLE_LINEAR = ("tests/methods/test_linear.py::test_linear_attention_equals_oracle",)
_MERGING = (
    "tests/methods/test_matching.py::test_golden_agentsd_merge",
    "tests/methods/test_matching.py::test_match_tokens_equals_oracle",
)
_APPLY = (f"{_PATCH}test_apply_and_remove",)
_SWITCH = (f"{_PATCH}test_applying_again_and_switching_methods",)
_UNET = ("tests/hosts/test_unet.py",)
_GOLDEN_SIT = ("tests/sit/test_model.py::test_golden_models",)
_SAMPLING = ("tests/sit/test_scheduler.py::test_sampling_equals_the_reference",)
_GUIDANCE = ("tests/sit/test_pipeline.py::test_guidance_of_all_channels_is_the_formula",)

MUTATIONS = {
    # Formulas
    "pooling swaps the axes": Mutation(
        _AGENT,
        "F.adaptive_avg_pool2d(image, size)",
        "F.adaptive_avg_pool2d(image, size[::-1])",
        ("tests/test_tokens.py::test_pool_tokens_equals_oracle",),
    ),
    "softmax without its scale": Mutation(
        "attngen/kernels/sdpa.py",
        "attn_mask=_mask(aggregation_bias, agents, key), scale=scale",
        "attn_mask=_mask(aggregation_bias, agents, key)",
        _ORACLE_AGENTS,
    ),
    "a bias is ignored": Mutation(
        "attngen/kernels/sdpa.py", "attn_mask=_mask(broadcast_bias, query, agents), ", "", _ORACLE_AGENTS
    ),
    "the reference without its scale": Mutation(
        _REFERENCE, ".transpose(-1, -2) * scale\n", ".transpose(-1, -2)\n", _PATHS
    ),
    "the reference ignores a bias": Mutation(_REFERENCE, "scores = scores + bias\n", "pass\n", _PATHS),
    "scores in half precision": Mutation(
        _REFERENCE,
        "wide = torch.promote_types(query.dtype, torch.float32)\n    scores",
        "wide = query.dtype\n    scores",
        (f"{_PROMISE}test_numbers.py::test_every_path_at_scores_of_a_million",),
    ),
    "one scale for both softmaxes": Mutation(
        _AGENT, "AgentScales(scale, scale**broadcast_exponent, shortcut)", "AgentScales(scale, scale, shortcut)", _UNET
    ),
    "no shortcut": Mutation(
        _AGENT,
        "scales = scales_for(head_dim, self.broadcast_exponent, self.shortcut)",
        "scales = scales_for(head_dim, self.broadcast_exponent, 0.0)",
        _UNET,
    ),
    "too many agents": Mutation(
        _AGENT,
        "agents, tokens = math.prod(self._cells(grid)), math.prod(grid)\n",
        "agents, tokens = math.prod(self._cells(grid)) // 4, math.prod(grid)\n",
        _APPLY,
        only="too-many-agents",
    ),
    "elu without one": Mutation(_LINEAR, "return F.elu(x) + 1\n", "return F.elu(x)\n", _ORACLE_LINEAR),
    "focused by another power": Mutation(_LINEAR, ")) ** factor", ")) ** (factor - 1)", _ORACLE_LINEAR),
    "merging sums instead of averages": Mutation(_MATCHING, 'reduce="mean")', 'reduce="sum")', _MERGING),
    "the least alike merge": Mutation(_MATCHING, "descending=True", "descending=False", _MERGING),
    "rows and columns of a cell": Mutation(
        _MATCHING,
        "+ draws // stride[1]\n",
        "+ draws // stride[0]\n",
        ("tests/methods/test_matching.py::test_random_targets_equal_tomesd",),
    ),
    "merged tokens lose digits": Mutation(
        _MATCHING,
        "wide = torch.promote_types(x.dtype, torch.float32)\n        targets",
        "wide = x.dtype\n        targets",
        ("tests/methods/test_matching.py::test_thousands_of_tokens_merge_into_one",),
    ),
    "one token too many merges": Mutation(
        _MATCHING,
        "int(tokens * ratio))",
        "int(tokens * ratio) + 1)",
        ("tests/methods/test_matching.py::test_match_counts",),
    ),
    "the wrong keys are kept": Mutation(
        "attngen/methods/downsample.py",
        'mode="nearest-exact"',
        'mode="nearest"',
        ("tests/test_tokens.py::test_downsample_tokens_equals_oracle",),
    ),
    "cells count once": Mutation(
        _FOCAL, "outside.log().clamp_min(_NOTHING)", "(outside / outside).log().clamp_min(_NOTHING)", _FOCAL_TESTS
    ),
    "cells count what is seen already": Mutation(_FOCAL, "columns - within)", "columns)", _FOCAL_TESTS),
    "regions leave the picture": Mutation(
        _FOCAL,
        "first.clamp(0, self.grid[axis] - self.region[axis])",
        "first.clamp(0, self.grid[axis] - 1)",
        _FOCAL_TESTS,
    ),
    "half precision rounds the counts": Mutation(
        _FOCAL,
        "(bias - coarse).to(keys.dtype)",
        "0",
        ("tests/methods/test_focal.py::test_the_count_of_a_cell_is_exact_in_half_precision",),
    ),
    # The patch
    "a hook stays": Mutation(
        _HOOKS,
        "for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Hook)]:",
        "for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, RootHook)]:",
        _APPLY,
    ),
    "an attribute stays": Mutation(_INSTALL, "        delattr(layer, SPEC)\n", "", _APPLY),
    "the processor is made anew": Mutation(
        _INSTALL,
        "            layer.set_processor(original)\n",
        "            layer.set_processor(type(original)())\n",
        _APPLY,
    ),
    "learned weights stay": Mutation(
        _INSTALL,
        "        drop_core(layer)\n",
        "",
        ("tests/learned/test_modules.py::test_nothing_of_it_shows_or_stays",),
    ),
    "a second patch wraps the first": Mutation(
        _INSTALL,
        "    uninstall(model)\n    layers = patchable_layers(model)",
        "    layers = patchable_layers(model)",
        _SWITCH,
    ),
    "an old handle removes the new patch": Mutation(
        "attngen/patch.py", "return hook is not None and hook.patch_id == self._id", "return hook is not None", _SWITCH
    ),
    "no removal at the end of with": Mutation(
        "attngen/patch.py",
        "    ) -> None:\n        self.remove()\n",
        "    ) -> None:\n        pass\n",
        (f"{_PATCH}test_undone_after_an_exception_in_any_call",),
    ),
    "a pause that stays": Mutation(
        "attngen/patch.py",
        "                hook.paused = value\n",
        "                pass\n",
        ("tests/learned/test_modules.py::test_paused_is_exact_and_reapply_brings_the_same_weights_back",),
    ),
    "patterns that match nothing": Mutation(
        "attngen/patch.py",
        "    _check_patterns(plan, models.values())\n",
        "",
        (f"{_PATCH}test_a_pattern_that_matches_no_layer_is_not_silent",),
    ),
    "another pipeline's patch is replaced": Mutation(
        "attngen/patch.py",
        "    check_owner(target, models)\n",
        "",
        (f"{_PROMISE}test_sharing.py::test_a_second_patch_through_another_pipeline_is_refused",),
    ),
    "cross-attention is patched": Mutation(
        _INSTALL,
        'if getattr(attn, "is_cross_attention", False):',
        "if False:",
        (f"{_PATCH}test_every_layer_is_reached",),
    ),
    "custom processors are replaced": Mutation(
        _INSTALL,
        "elif processor not in _PLAIN and not isinstance(attn.processor, hooks.PROCESSORS):",
        "elif False:",
        ("tests/hosts/test_integrations.py::test_a_custom_processor_is_left_alone",),
    ),
    "an attention mask is ignored": Mutation(
        _SINGLE,
        "encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3",
        "encoder_hidden_states is None and hidden_states.ndim == 3",
        (f"{_PROMISE}test_patching.py::test_a_mask_of_attention_is_obeyed_in_a_call_of_the_model",),
    ),
    "the norm before a layer is forgotten": Mutation(
        _SINGLE,
        "hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)\n",
        "pass\n",
        (f"{_PROMISE}test_patching.py::test_what_a_layer_does_around_its_attention_stays",),
    ),
    "the residual is forgotten": Mutation(
        _SINGLE,
        "hidden_states = hidden_states + residual\n",
        "pass\n",
        (f"{_PROMISE}test_patching.py::test_what_a_layer_does_around_its_attention_stays",),
    ),
    "the scale of the output is forgotten": Mutation(
        _SINGLE,
        'return hidden_states / getattr(attn, "rescale_output_factor", 1.0)',
        "return hidden_states",
        (f"{_PROMISE}test_patching.py::test_what_a_layer_does_around_its_attention_stays",),
    ),
    "similarity of the wrong tokens": Mutation(
        _SINGLE,
        "metric = hidden_states if info.metric is None else info.metric",
        "metric = hidden_states",
        ("tests/hosts/test_unet.py::test_tome_gives_the_numbers_of_tomesd",),
    ),
    "the norm of the keys is forgotten": Mutation(
        _JOINT,
        'to_heads(attn, key, "norm_k")',
        "split_heads(key, attn.heads)",
        ("tests/hosts/test_transformers.py::test_sd3_layers_by_definition",),
    ),
    "text queries see the image alone": Mutation(
        _JOINT,
        "keys, values = with_context(image[1], image[2], context)",
        "keys, values = image[1], image[2]",
        ("tests/hosts/test_transformers.py::test_text_queries_stay_exact",),
    ),
    "agents are not rotated": Mutation(
        _JOINT,
        "agents = None if agents is None else rotate(agents, agent_positions)",
        "pass",
        ("tests/hosts/test_transformers.py::test_flux_layers_by_definition",),
    ),
    "rotation the other way": Mutation(
        _FLUX,
        "torch.stack([-imaginary, real], dim=-1)",
        "torch.stack([imaginary, -real], dim=-1)",
        ("tests/hosts/test_transformers.py::test_flux_layers_by_definition",),
    ),
    "text and image change places": Mutation(
        _FLUX,
        "return torch.cat([mixed_text, restored], dim=1)",
        "return torch.cat([restored, mixed_text], dim=1)",
        ("tests/hosts/test_transformers.py::test_flux_layers_by_definition",),
    ),
    "height and width change places": Mutation(
        "attngen/hosts/families.py",
        "return int(height) // side, int(width) // side",
        "return int(width) // side, int(height) // side",
        ("tests/hosts/test_transformers.py::test_every_layer_gets_the_grid",),
    ),
    "the clock runs backwards": Mutation(
        "attngen/hosts/families.py",
        "return _clamped(1.0 - timestep)",
        "return _clamped(timestep)",
        (f"{_PATCH}test_stages_by_time",),
    ),
    "stages end too early": Mutation(
        "attngen/schedule.py",
        "sum(time <= start for start in starts)",
        "sum(time < start for start in starts)",
        ("tests/test_schedule.py",),
    ),
    "the level falls again": Mutation(
        "attngen/schedule.py",
        "            self.level += 1\n",
        "            self.level = 1\n            break\n",
        ("tests/test_schedule.py",),
    ),
    "draws depend on the time alone": Mutation(
        _HOOKS,
        'f"{self.seed} {times[0] if times else 0.0!r}"',
        'f"{times[0] if times else 0.0!r}"',
        (f"{_PATCH}test_random_merging_depends_on_seed_and_time_alone",),
    ),
    "draws of the global generator": Mutation(
        _HOOKS,
        "(grid[0] * grid[1],), generator=generator)",
        "(grid[0] * grid[1],))",
        (f"{_PATCH}test_the_global_random_state_is_neither_read_nor_changed",),
    ),
    "the caller's dictionary is changed": Mutation(
        _HOOKS,
        "return self.channel.put(args, kwargs, {**(given or {}), CHANNEL_KEY: info})",
        "given = {} if given is None else given\n"
        "        given[CHANNEL_KEY] = info\n"
        "        return self.channel.put(args, kwargs, given)",
        (f"{_PATCH}test_the_callers_arguments_are_not_changed",),
    ),
    "nothing is said of replaced processors": Mutation(
        _HOOKS,
        "if name is not None and self._told_about != name:",
        "if False:",
        ("tests/hosts/test_integrations.py::test_slicing_is_noticed_and_mended",),
    ),
    "stages of a batch are mixed": Mutation(
        _HOOKS,
        "        if len(stages) > 1:\n",
        "        if False:\n",
        (f"{_PATCH}test_mixed_stages_in_a_batch_are_refused",),
    ),
    "a hook keeps the latents": Mutation(
        _HOOKS,
        "        self.last_seen = size\n",
        "        self.last_seen = size\n        self.kept = inspect.currentframe().f_back.f_locals['sample']\n",
        (f"{_PROMISE}test_machines.py::test_out_of_memory_in_a_step",),
    ),
    # Models, samplers, pipelines
    "shift and scale change places": Mutation(
        _SIT,
        "shift_attn, scale_attn, gate_attn, shift_ff,",
        "scale_attn, shift_attn, gate_attn, shift_ff,",
        _GOLDEN_SIT,
    ),
    "rows and columns of the position": Mutation(
        _SIT, "return torch.cat([column, row], dim=-1)", "return torch.cat([row, column], dim=-1)", _GOLDEN_SIT
    ),
    "patches are put back transposed": Mutation(
        _SIT, "image.permute(0, 5, 1, 3, 2, 4)", "image.permute(0, 5, 1, 4, 2, 3)", _GOLDEN_SIT
    ),
    "labels are dropped for the wrong class": Mutation(
        _SIT,
        "class_labels = class_labels.masked_fill(drop_labels, null)",
        "class_labels = class_labels.masked_fill(drop_labels, 0)",
        ("tests/sit/test_model.py::test_label_dropout_in_training_and_gradient_of_the_null_class",),
    ),
    "guidance of one time more": Mutation(
        _PIPELINE,
        "unconditional + self.guidance_scale * (conditional - unconditional)",
        "conditional + self.guidance_scale * (conditional - unconditional)",
        _GUIDANCE,
    ),
    "the null class last": Mutation(_PIPELINE, "torch.cat([null, labels])", "torch.cat([labels, null])", _GUIDANCE),
    "the sign of flow matching": Mutation(
        _PIPELINE,
        "output = -output  #",
        "pass  #",
        ("tests/sit/test_pipeline.py::test_flow_matching_euler_is_the_euler_ode",),
    ),
    "the noise of the SDE is too small": Mutation(
        _INTERPOLANT, "torch.sqrt(2 * dt * diffusion)", "torch.sqrt(dt * diffusion)", _SAMPLING
    ),
    "the last step keeps the drift": Mutation(
        _INTERPOLANT,
        'return _Call(t, "euler", size, velocity, data)',
        'return _Call(t, "euler", size, drift, data)',
        _SAMPLING,
    ),
    # Files
    "plans of any version": Mutation(
        "attngen/plan.py",
        'if data.get("version") != VERSION or isinstance(data["version"], bool):',
        "if False:",
        ("tests/test_plan.py::test_bad_files_name_themselves_and_the_value",),
    ),
    "a plan is written in place": Mutation(
        "attngen/files.py",
        '    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")\n',
        "    temporary = path\n",
        (f"{_PROMISE}test_files.py::test_files_are_written_whole_and_readable_by_all",),
    ),
    "files that only their owner reads": Mutation(
        "attngen/files.py",
        "        os.chmod(temporary, 0o644)\n",
        "",
        (f"{_PROMISE}test_files.py::test_files_are_written_whole_and_readable_by_all",),
    ),
    "pickles without a flag": Mutation(
        "attngen/sit/checkpoints.py",
        "    if not allow_pickle:\n",
        "    if False:\n",
        ("tests/sit/test_model.py::test_checkpoints_from_files",),
    ),
    "pickles of anything": Mutation(
        "attngen/sit/checkpoints.py",
        "weights_only=True)",
        "weights_only=False)",
        (
            f"{_PROMISE}test_files.py::test_pickles_are_never_run",
            f"{_PROMISE}test_files.py::test_no_code_runs_what_it_reads",
        ),
    ),
    "a checkpoint without its mark": Mutation(
        "train/checkpoint.py",
        "if _NAME.fullmatch(path.name) and (path / _MARKER).is_file())",
        "if _NAME.fullmatch(path.name))",
        ("tests/train/test_sit_training.py::test_checkpoints_are_whole_or_absent",),
    ),
    "a black picture is written": Mutation(
        _PIPELINE,
        "if not torch.isfinite(latents).all():",
        "if False:",
        ("tests/sit/test_pipeline.py::test_nan_is_no_picture",),
    ),
    "a picture of a broken VAE is written": Mutation(
        _PIPELINE,
        "if not torch.isfinite(pixels).all():",
        "if False:",
        ("tests/sit/test_pipeline.py::test_nan_from_the_vae_is_no_picture",),
    ),
}
"""Name of the fault -> what it is."""
