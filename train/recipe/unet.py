"""A UNet on classes, for the training program: diffusers' UNet2DConditionModel behind the interface of our SiT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from attngen.sit.unet_pipeline import UNetClassPipeline, class_condition
from train.recipe.config import NORM_GROUPS, TrainingConfig

if TYPE_CHECKING:
    from train.data.base import Data

# The UNet's clock: 0 is data, this is noise, as in diffusers' flow-matching schedulers.
NOISE = 1000


class ClassUNet(nn.Module):
    """A UNet that is called as a SiT.

    SiT's time is 0 at noise and 1 at data and its velocity is data − noise; the UNet gets 1000 (1 − time) and predicts
    noise − data, which is what diffusers' flow-matching schedulers draw with.

    Args:
        unet: with `num_class_embeds` and `cross_attention_dim` one more than there are classes; the last is the null
            class.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def from_config(cls, config: Any) -> ClassUNet:
        """A new network of the same form."""
        return cls(UNet2DConditionModel.from_config(config))  # type: ignore[arg-type]

    @property
    def config(self) -> Any:
        """Of the UNet."""
        return self.unet.config

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.unet.device

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        num_mediators: None = None,
        drop_labels: Tensor | None = None,
    ) -> Transformer2DModelOutput:
        """The velocity at a noisy picture.

        Args:
            hidden_states: (B, C, H, W).
            timestep: (B,), 0 is noise and 1 is data.
            class_labels: (B,).
            num_mediators: a UNet has none.
            drop_labels: (B,) bool, labels to replace by the null class.

        Returns:
            `.sample`: (B, C, H, W), data − noise.
        """
        embeds = self.config["num_class_embeds"]
        if drop_labels is not None:
            class_labels = class_labels.masked_fill(drop_labels, embeds - 1)
        condition = class_condition(class_labels, embeds, hidden_states.dtype)
        output = self.unet(hidden_states, NOISE * (1 - timestep), **condition)
        return Transformer2DModelOutput(sample=-output.sample)

    def pipeline(self, id2label: dict[int, str]) -> UNetClassPipeline:
        """The pipeline that draws from it."""
        return UNetClassPipeline(self.unet, FlowMatchEulerDiscreteScheduler(), id2label)


def build_unet(config: TrainingConfig, data: Data) -> ClassUNet:
    """The UNet of a configuration: attention in the middle and at all resolutions but the last."""
    channels, embeds = config.block_channels, data.num_classes + 1
    inner = len(channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed seeds GPUs too
        unet = UNet2DConditionModel(
            sample_size=data.sample_size,
            in_channels=data.channels,
            out_channels=data.channels,
            down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
            block_out_channels=channels,
            layers_per_block=config.num_layers,
            cross_attention_dim=embeds,
            num_class_embeds=embeds,
            # diffusers' name for the number of heads
            attention_head_dim=tuple(width // config.attention_head_dim for width in channels),  # type: ignore[arg-type]
            norm_num_groups=NORM_GROUPS,
        )
    return ClassUNet(unet)
