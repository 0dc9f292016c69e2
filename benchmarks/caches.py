"""What saves work elsewhere in a denoising loop, as other packages do it: step caches, token merging, 8-bit weights.

Each function changes a loop's model, or raises `Refused`. A loop has `model`, `kind` ("unet", "sit", "dit", ...),
`scheduler`, `steps`, `guided`, the `time` of the step that runs, from 1000 (noise) to 0, the `device_time`, and
`resets`, functions that are called before a loop starts, and `each_step`, called with the number of each step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

INTERVAL = 3
"""Steps from one computed step to the next, where a cache has such a number."""


class Refused(Exception):
    """Why a peer cannot be measured here."""


def _tomesd(loop: Any) -> None:
    if loop.kind != "unet":
        raise Refused("tomesd merges tokens of UNets only")
    try:
        import tomesd
    except ImportError:
        raise Refused("tomesd is not installed (the peers extra)") from None
    tomesd.apply_patch(loop.model, ratio=0.5, use_rand=False)


def _deepcache(loop: Any) -> None:
    if loop.kind != "unet":
        raise Refused("DeepCache skips the inner levels of UNets only")
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise Refused("DeepCache is not installed (the peers extra)") from None
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=loop.model, scheduler=loop.scheduler))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    helper.enable()
    # DeepCache reads the number of the time step, which waits for a GPU; it gets it on the CPU, the UNet on the device.
    inner = helper.function_dict["unet_forward"]
    helper.function_dict["unet_forward"] = lambda sample, time, **given: inner(sample, loop.device_time, **given)
    loop.gives_device_time = False


def _pab(loop: Any) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=INTERVAL,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: int(loop.time),
    )
    apply_pyramid_attention_broadcast(loop.model, config)
    _reset_hooks(loop)


def _fastercache(loop: Any) -> None:
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    if loop.kind == "unet":
        raise Refused("diffusers' FasterCache looks for attention where transformers have it, not UNets")
    if not loop.guided:
        raise Refused("FasterCache saves the pass without condition, and --no-guidance leaves that out")
    split = ["hidden_states", "encoder_hidden_states", "timestep", "class_labels"]
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        unconditional_batch_timestep_skip_range=(-1, 641),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: int(loop.time),
        _unconditional_conditional_input_kwargs_identifiers=split,
    )
    apply_faster_cache(loop.model, config)
    _reset_hooks(loop)


def _taylorseer(loop: Any) -> None:
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=INTERVAL,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32 if loop.model.dtype == torch.float32 else torch.bfloat16,
        cache_identifiers=[r".*transformer_blocks\.\d+\.(attn|attn1|attn2|ff)"],
    )
    apply_taylorseer_cache(loop.model, config)
    _reset_hooks(loop)


def _cache_dit(loop: Any) -> None:
    if loop.kind == "unet":
        raise Refused("cache-dit caches rows of transformer blocks, which a UNet is not")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # before the import, which reads it
    try:
        import cache_dit
    except ImportError:
        raise Refused("cache-dit is not installed (the peers extra)") from None
    functor = None
    if loop.kind == "dit":
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        functor = DiTPatchFunctor()
    adapter = cache_dit.BlockAdapter(
        transformer=loop.model,
        blocks=loop.model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=functor,
        check_forward_pattern=False,
    )
    warm = min(3, loop.steps - 1)
    mask = [1 if step < warm or (step - warm) % INTERVAL == INTERVAL - 1 else 0 for step in range(loop.steps)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=warm,
        residual_diff_threshold=1e9,
        num_inference_steps=loop.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    loop.resets.append(lambda: cache_dit.refresh_context(loop.model, cache_config=config))


def _first_block(loop: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    _register_blocks(loop)
    # Its threshold is of features; to compare savings, it reuses between steps that are computed anyhow.
    apply_first_block_cache(loop.model, FirstBlockCacheConfig(threshold=1e9))
    registry = _reset_hooks(loop)
    loop.each_step.append(lambda step: registry.reset_stateful_hooks() if step % INTERVAL == 0 else None)


def _seacache(loop: Any) -> None:
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    _register_blocks(loop)
    config = SeaCacheConfig(
        threshold=1e9,
        max_consecutive_cached=INTERVAL - 1,
        raw_vision_callback=lambda model, args, kwargs: _frames(kwargs.get("hidden_states", args[0] if args else None)),
    )
    apply_sea_cache(loop.model, config)
    _reset_hooks(loop)


def _frames(latents: Any) -> list[Any]:
    """Images as videos of one frame: (C, 1, H, W) each."""
    return [image.unsqueeze(1) for image in latents]


def _register_blocks(loop: Any) -> None:
    """Describe the blocks of SiT to diffusers, which has those of its own models in a table."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    if loop.kind != "sit":
        raise Refused("it caches rows of transformer blocks that diffusers has in its table, and SiT's")
    cls = type(loop.model.transformer_blocks[0])
    metadata = TransformerBlockMetadata()  # it returns the tokens alone
    TransformerBlockRegistry.register(model_class=cls, metadata=metadata)


def _int8(loop: Any) -> None:
    """8-bit weights and activations of all linear layers, quantised as they come; torch's own, for CPUs."""
    import torch

    if next(loop.model.parameters()).device.type != "cpu":
        raise Refused("torch's dynamic quantisation computes on CPUs only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(loop.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def _reset_hooks(loop: Any) -> Any:
    """Start every loop with empty caches; returns the registry of the model's hooks."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(loop.model)
    registry.invalidate_child_registries_cache()
    loop.resets.append(registry.reset_stateful_hooks)
    return registry


CACHES: dict[str, Callable[[Any], None]] = {
    "tomesd": _tomesd,
    "deepcache": _deepcache,
    "pab": _pab,
    "fastercache": _fastercache,
    "taylorseer": _taylorseer,
    "cache-dit": _cache_dit,
    "first-block": _first_block,
    "seacache": _seacache,
    "int8": _int8,
}
