"""The two things importing attngen does to diffusers: its classes become loadable, its processors and blocks known."""

from __future__ import annotations

from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.single import AttnGenProcessor
from attngen.models.sit import (
    SiTAttnProcessor,
    SiTLinearAttnProcessor,
    SiTMediatorAttnProcessor,
    SiTTransformerBlock,
)


def register() -> None:
    """Make diffusers load and save attngen's classes, and let its guiders and caches work on them."""
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("attngen", {"ModelMixin": methods, "SchedulerMixin": methods})
    plain: AttentionProcessorMetadata = AttentionProcessorRegistry.get(AttnProcessor2_0)
    for processor in (
        AttnGenProcessor,
        JointAttnGenProcessor,
        SiTAttnProcessor,
        SiTLinearAttnProcessor,
        SiTMediatorAttnProcessor,
    ):
        AttentionProcessorRegistry.register(processor, plain)
    AttentionProcessorRegistry.register(FluxAttnGenProcessor, AttentionProcessorRegistry.get(FluxAttnProcessor))
    TransformerBlockRegistry.register(
        SiTTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=0),
    )
