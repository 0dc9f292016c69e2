"""Side effects of `import attngen` on diffusers: its classes, processors and blocks are registered."""

from __future__ import annotations

from typing import Any

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
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.install import PLAIN
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.sit.attention import SiTAttnProcessor, SiTLinearAttnProcessor, SiTMediatorAttnProcessor
from attngen.sit.model import SiTTransformerBlock


def _skip_joint(
    attn: Any, hidden_states: Any = None, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """What a joint layer returns when a guider skips it: its input."""
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def register() -> None:
    """Make diffusers load and save attngen's classes, and let its guiders and caches work on them."""
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("attngen", {"ModelMixin": methods, "SchedulerMixin": methods})
    PLAIN["SiTAttnProcessor"] = AttnGenProcessor
    plain: AttentionProcessorMetadata = AttentionProcessorRegistry.get(AttnProcessor2_0)
    for processor in (
        AttnGenProcessor,
        SiTAttnProcessor,
        SiTLinearAttnProcessor,
        SiTMediatorAttnProcessor,
    ):
        AttentionProcessorRegistry.register(processor, plain)
    AttentionProcessorRegistry.register(JointAttnGenProcessor, AttentionProcessorMetadata(_skip_joint))
    AttentionProcessorRegistry.register(FluxAttnGenProcessor, AttentionProcessorRegistry.get(FluxAttnProcessor))
    TransformerBlockRegistry.register(
        SiTTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=0),
    )
