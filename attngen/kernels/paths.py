"""The kernels of agent attention by name: the same function of the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from attngen.kernels import matmul, reference, sdpa
from attngen.kernels.triton import agent as triton_agent

AGENT_PATHS: Mapping[str, Callable[..., Tensor]] = {
    "reference": reference.agent_attention,
    "sdpa": sdpa.agent_attention,
    "matmul": matmul.agent_attention,
    "triton": triton_agent.agent_attention,
}
"""Called with query, key, value, agents, scales, biases and convolution, see `reference.agent_attention`."""
