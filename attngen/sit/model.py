"""SiT and DiT: a diffusion transformer with softmax, mediator or linear attention.

Papers: SiT, Ma et al., ECCV 2024, arXiv 2401.08740; the network is DiT's, arXiv 2212.09748; mediators: 2408.05710.
Time at the model's edge is each paper's own: for SiT t in [0, 1], 0 is noise and 1 is data; for DiT the steps 0 to 999,
999 is noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from attngen.checks import Grid, check_choice
from attngen.layers.mediator import CONVOLUTIONS, MediatorMixer
from attngen.methods.linear import FEATURE_MAPS, FeatureMapName
from attngen.sit.attention import ATTENTION_KINDS, AttentionKind, SiTAttention
from attngen.sit.checkpoints import PATCH_SIZES, SIZES, convert_original, read_checkpoint

ConvolutionKind = Literal["values", "input"]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SiTTransformerBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, attn: SiTAttention, mlp_ratio: float) -> None:
        super().__init__()
        width = attn.inner_dim
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = attn
        self.ff = FeedForward(width, inner_dim=int(width * mlp_ratio), activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        grid: Grid,
        num_mediators: int | Grid | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """(B, N, C) tokens and (B, C) condition -> (B, N, C)."""
        chunks = self.modulation(nn.functional.silu(condition)).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = chunks
        attention_kwargs = {"grid": grid, "num_mediators": num_mediators, **(attention_kwargs or {})}
        attended = self.attn(_modulate(self.norm1(hidden_states), shift_attn, scale_attn), **attention_kwargs)
        hidden_states = hidden_states + gate_attn.unsqueeze(1) * attended
        fed = self.ff(_modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return hidden_states + gate_ff.unsqueeze(1) * fed


class SiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """SiT or DiT denoiser over latents or pixels of any height and width that the patch size divides.

    Args:
        sample_size: height and width trained on, in latent pixels (one number, or two).
        patch_size: side of a token, in latent pixels.
        in_channels: channels of the latents.
        num_layers: blocks.
        num_attention_heads: heads of each block.
        attention_head_dim: size of a head; heads times head size is the width.
        mlp_ratio: feed-forward width over width.
        num_classes: classes; label `num_classes` is the null class that guidance needs.
        class_dropout_prob: label dropout, the share of labels replaced by the null class in training; 0 for a model
            without a trained null class.
        learn_sigma: predict twice the channels, as the published checkpoints do; SiT drops the second half.
        attention: kind of self-attention.
        num_mediators: mediators trained with: a count, brought down to what the token grid holds, or (rows, columns),
            also more than there are tokens. `forward` takes any other count.
        feature_map: for linear attention.
        convolution: for mediators: "values", as published, or "input", which is faster with few mediators; weights
            trained with one do not fit the other.
        predicts_variance: a DiT: the timestep is 0 to 999 (999 is noise), and the output keeps all 2 · C channels: the
            noise, and the log variance as a position between its bounds (-1 to 1; "learned_range" in diffusers).
        out_channels: channels of the output. It follows from the others; diffusers reads it from the configuration.

    Raises:
        ValueError: for an unknown `attention`, `feature_map` or `convolution`, a patch size that does not divide the
            sample size, a variance without `learn_sigma`, or `out_channels` that contradict the others.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]
    _repeated_blocks = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "class_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        attention: AttentionKind = "softmax",
        num_mediators: int | tuple[int, int] = 64,
        feature_map: FeatureMapName = "elu",
        convolution: ConvolutionKind = "values",
        predicts_variance: bool = False,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("convolution", convolution, CONVOLUTIONS)
        check_choice("attention", attention, ATTENTION_KINDS)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        self.register_to_config(
            out_channels=_output_channels(in_channels, learn_sigma, predicts_variance, out_channels)
        )
        heads, head_dim, grid = num_attention_heads, attention_head_dim, self.token_grid
        width = heads * head_dim
        self._projected_channels = in_channels * 2 if learn_sigma else in_channels

        def attention_layer() -> SiTAttention:
            return SiTAttention(heads, head_dim, attention, num_mediators, grid, feature_map, convolution)

        self.patch_embed = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, width)
        self.class_embedder = nn.Embedding(num_classes + 1, width)
        blocks = (SiTTransformerBlock(attention_layer(), mlp_ratio) for _ in range(num_layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size * patch_size * self._projected_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier, small embeddings, zero gates and output, so each block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, MediatorMixer):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        times = self.time_embedder
        for weight in (self.class_embedder.weight, times.linear_1.weight, times.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        gates: list[Any] = [block.modulation for block in self.transformer_blocks]
        for linear in (*gates, self.modulation_out, self.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_preset(cls, name: str, **config: Any) -> SiTTransformer2DModel:
        """A published size with new weights: "SiT-S/2", …, "SiT-XL/8", or "DiT-S/2", …, "DiT-XL/8", the same sizes with
        noise and variance as their output. `config` overrides any argument.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        known = {
            f"{family}-{size}/{patch}": {**SIZES[size], "patch_size": patch, "predicts_variance": family == "DiT"}
            for family in ("SiT", "DiT")
            for size in SIZES
            for patch in PATCH_SIZES
        }
        check_choice("preset", name, known)
        return cls(**{**known[name], **config})

    @classmethod
    def from_original(
        cls,
        checkpoint: Mapping[str, Any] | str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        **config: Any,
    ) -> SiTTransformer2DModel:
        """Load a checkpoint of the official SiT, DiT or Attention-Mediators code; sizes are inferred from its tensors.

        The tensors of a DiT and a SiT have the same names and shapes: pass `predicts_variance=True` for a DiT.

        The official code has a row for the null class only if it trained with label dropout, which the tensors do not
        show. The last row counts as the null class, except in a table of 1000 rows, the classes of ImageNet. For
        another model trained without label dropout pass its `num_classes`, or `class_dropout_prob=0`; else its last
        class is missing. Such a model has no use for guidance; `SiTPipeline` warns of it.

        Args:
            checkpoint: a state dict, a training checkpoint that holds one under "ema" or "model", or a file with
                either (.safetensors, or .pt with `allow_pickle`).
            allow_pickle: read a pickled file, with `weights_only=True`.
            config: arguments of the model that override the inferred ones, such as `predicts_variance`;
                `num_attention_heads` is needed where the width is not a published one.

        Raises:
            ValueError: if the file cannot be read, or a tensor is missing, left over or of the wrong shape.
        """
        state_dict = read_checkpoint(checkpoint, allow_pickle=allow_pickle)
        try:
            settings, weights = convert_original(state_dict, config)
            model = cls(**settings)
            model.load_state_dict(weights)
        except (ValueError, RuntimeError) as error:
            origin = "the checkpoint" if isinstance(checkpoint, Mapping) else checkpoint
            raise ValueError(f"{origin} does not fit: {' '.join(str(error).split())}") from error
        dtype = next(iter(weights.values())).dtype
        if dtype != model.dtype:
            # ModelMixin.to would warn about modules kept in float32; there are none here.
            nn.Module.to(model, dtype)
        return model

    @property
    def token_grid(self) -> Grid:
        """(height, width) in tokens at the trained size."""
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return _token_grid(height, width, self.config["patch_size"])

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        num_mediators: int | tuple[int, int] | None = None,
        drop_labels: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict (velocity, noise or score, as trained; a DiT noise and variance) for noisy latents.

        Args:
            hidden_states: (B, C, H, W) noisy latents.
            timestep: (B,) or a single number, in [0, 1]: 0 is noise, 1 is data; for a DiT its step,
                0 (nearly data) to 999 (noise).
            class_labels: (B,) class numbers; `num_classes` is the null class, and None means it for all.
            num_mediators: a count, or (rows, columns), of mediators for this call; None for the trained count.
            drop_labels: (B,) bool, labels to replace by the null class; random in training mode if None.
            attention_kwargs: passed to the attention processors; "scale" is LoRA's, "kernel" the path that computes
                mediator and linear attention, see `attngen.functional`.
            return_dict: return an object with `.sample`, else a tuple.

        Returns:
            `.sample`: (B, C, H, W), or (B, 2 · C, H, W) with the variance.

        Raises:
            ValueError: if the patch size does not divide H and W.
        """
        height, width = hidden_states.shape[-2:]
        grid = _token_grid(height, width, self.config["patch_size"])
        condition = self._condition(hidden_states, timestep, class_labels, drop_labels)
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        tokens = tokens + position_embedding(grid, tokens.shape[-1], tokens.device).to(tokens.dtype)
        for block in self.transformer_blocks:
            arguments = (tokens, condition, grid, num_mediators, attention_kwargs)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *arguments)  # type: ignore[misc]
            else:
                tokens = block(*arguments)
        shift, scale = self.modulation_out(nn.functional.silu(condition)).chunk(2, dim=1)
        patches = self.proj_out(_modulate(self.norm_out(tokens), shift, scale))
        output = self._unpatchify(patches, grid)[:, : self.config["out_channels"]]
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _condition(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None, drop_labels: Tensor | None
    ) -> Tensor:
        """(B, C): time embedding plus class embedding."""
        batch, device = len(hidden_states), hidden_states.device
        time = torch.as_tensor(timestep, device=device).expand(batch)
        null = self.config["num_classes"]
        if class_labels is None:
            class_labels = torch.full((batch,), null, device=device)
        if drop_labels is None and self.training and self.config["class_dropout_prob"] > 0:
            drop_labels = torch.rand(batch, device=device) < self.config["class_dropout_prob"]
        if drop_labels is not None:
            class_labels = class_labels.masked_fill(drop_labels, null)
        embedded = self.time_embedder(self.time_proj(time).to(hidden_states.dtype))
        return embedded + self.class_embedder(class_labels)

    def _unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, N, p · p · C) -> (B, C, H, W)."""
        side = self.config["patch_size"]
        image = patches.unflatten(2, (side, side, self._projected_channels)).unflatten(1, grid)
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _output_channels(in_channels: int, learn_sigma: bool, predicts_variance: bool, given: int | None) -> int:
    """Channels that `forward` returns; ValueError where the settings contradict each other."""
    if predicts_variance and not learn_sigma:
        raise ValueError("predicts_variance=True needs learn_sigma=True: the variance has channels of its own")
    follows = 2 * in_channels if predicts_variance else in_channels
    if given not in (None, follows):
        raise ValueError(
            f"out_channels={given} contradicts in_channels={in_channels} and predicts_variance={predicts_variance},"
            f" which make {follows}; leave it out"
        )
    return follows


def _token_grid(height: int, width: int, patch_size: int) -> Grid:
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch_size} x {patch_size}")
    return height // patch_size, width // patch_size


def position_embedding(grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine-cosine embedding of rows and columns, (1, N, width), float32 (section 3.2 of arXiv 2212.09748).

    The first half of the channels holds the column, the second the row, in whole tokens from 0, as in DiT and SiT.
    diffusers' own function rescales positions, and computes in float64, which changes samples by 2e-6.

    Raises:
        ValueError: if the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"the width must be a multiple of 4 for the position embedding, got {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4))

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = axis(grid[0])[:, None].expand(-1, grid[1], -1)
    column = axis(grid[1])[None].expand(grid[0], -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).unsqueeze(0)
