"""The dtype of `torch.autocast` around a call."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device, such as "cuda"; None where it is off or there is none."""
    # For a device without autocast, such as "meta", `get_autocast_dtype` raises; `is_autocast_available` cannot be
    # compiled by torch 2.10, and compiled code runs on devices that have autocast.
    if device_type == "meta" or not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
