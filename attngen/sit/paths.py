"""Interpolant paths between noise and data, and how data, noise and velocity follow from a prediction on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

PathName = Literal["linear", "gvp", "vp"]
PredictionType = Literal["velocity", "epsilon", "score"]
DiffusionForm = Literal["sigma", "sbdm", "linear", "constant", "decreasing", "increasing-decreasing"]

# Where a quantity is infinite at t = 0 or t = 1, its conversions hold t this far inside.
EDGE = 1e-5


@dataclass(frozen=True)
class PathPoint:
    """The path at the times t: α, σ and their derivatives, all of the shape of t."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """W = α'σ − ασ' > 0, the determinant of (x₁, x₀) -> (v, x_t): constant for the linear and the GVP path."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    @property
    def diffusivity(self) -> Tensor:
        """D = (α'/α) σ² − σσ' = σW/α: the w for which the SDE is the time reversal of the noising one (SBDM)."""
        return self.sigma * self.wronskian / self.alpha


def linear_path(t: Tensor) -> PathPoint:
    """α = t, σ = 1 − t."""
    one = torch.ones_like(t)
    return PathPoint(t, t, 1 - t, one, -one)


def gvp_path(t: Tensor) -> PathPoint:
    """Generalised variance preserving: α = sin(πt/2), σ = cos(πt/2), written as a sine so that σ(1) is exactly 0."""
    quarter = math.pi / 2
    alpha, sigma = torch.sin(quarter * t), torch.sin(quarter * (1 - t))
    return PathPoint(t, alpha, sigma, quarter * sigma, -quarter * alpha)


def vp_path(t: Tensor) -> PathPoint:
    """Variance preserving: log α = −(1 − t)² (β₁ − β₀)/4 − (1 − t) β₀/2 with β from 0.1 to 20, σ² = 1 − α².

    σ' = −αα'/σ is infinite at t = 1; from 1 − 1e-5 on, where training ends, it keeps its value.
    """
    beta_0, beta_1 = 0.1, 20.0

    def log_alpha(u: Tensor) -> Tensor:
        return -(u**2) * (beta_1 - beta_0) / 4 - u * beta_0 / 2

    alpha, sigma = _vp_levels(log_alpha(1 - t))
    d_alpha = alpha * (beta_0 + (1 - t) * (beta_1 - beta_0)) / 2
    # Only the denominator is held off 0: α and α' are flat there.
    floor = _vp_levels(log_alpha(torch.full_like(t, EDGE)))[1]
    return PathPoint(t, alpha, sigma, d_alpha, -alpha * d_alpha / torch.maximum(sigma, floor))


def _vp_levels(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(α, √(1 − α²)); expm1 keeps the digits of σ near 0."""
    return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


PATHS: dict[str, Callable[[Tensor], PathPoint]] = {"linear": linear_path, "gvp": gvp_path, "vp": vp_path}


def point_at(path: str, timesteps: float | Tensor, sample: Tensor, inside: bool = False) -> PathPoint:
    """The path at times t in [0, 1], a number, a scalar tensor or (B,), shaped to broadcast with a sample (B, ...).

    Args:
        path: its name, a key of `PATHS`.
        timesteps: t; on an accelerator its values are not checked, because reading them would make the host wait.
        sample: gives batch size, rank, device and dtype.
        inside: hold t in [1e-5, 1 − 1e-5].

    Raises:
        ValueError: for integers, times outside [0, 1], and another number of times than samples.
    """
    t = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, dtype=torch.float64)
    if not t.is_floating_point():
        raise ValueError(f"timesteps are times in [0, 1] (0 is noise, 1 is data), not indices of {t.dtype}")
    if t.ndim > 1 or t.numel() not in (1, len(sample)):
        raise ValueError(
            f"timesteps must be one time or one for each of the {len(sample)} samples, got {tuple(t.shape)}"
        )
    if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"timesteps must be in [0, 1], where 0 is noise and 1 is data, got {t.tolist()}")
    t = t.to(sample.device, working_dtype(sample)).reshape(-1, *[1] * (sample.ndim - 1))
    return PATHS[path](t.clamp(EDGE, 1 - EDGE) if inside else t)


def working_dtype(sample: Tensor) -> torch.dtype:
    """float32, or float64 for float64 samples."""
    return torch.promote_types(sample.dtype, torch.float32)


# w(t), to be multiplied by diffusion_norm (arXiv 2401.08740).
DIFFUSION_FORMS: dict[str, Callable[[PathPoint], Tensor]] = {
    "sigma": lambda point: point.sigma,
    "sbdm": lambda point: point.diffusivity,
    "linear": lambda point: 1 - point.t,
    "constant": lambda point: torch.ones_like(point.t),
    "decreasing": lambda point: (1 + torch.cos(math.pi * point.t)) ** 2 / 4,
    "increasing-decreasing": lambda point: torch.sin(math.pi * point.t) ** 2,
}


class Affine(NamedTuple):
    """The coefficients of x_t and of the model's output m in a quantity that is linear in both; numbers or tensors."""

    of_sample: Any
    of_output: Any

    def __call__(self, sample: Tensor, output: Tensor) -> Tensor:
        return self.of_sample * sample + self.of_output * output


class Estimates(NamedTuple):
    """The data x₁, the noise x₀ and the velocity v that follow from a prediction."""

    data: Affine
    noise: Affine
    velocity: Affine


def _from_velocity(point: PathPoint) -> Estimates:
    """m = v: x₁ = (σm − σ'x)/W, x₀ = (α'x − αm)/W; no division by α, so finite at t = 0."""
    w = point.wronskian
    zero = torch.zeros_like(point.t)
    return Estimates(
        data=Affine(-point.d_sigma / w, point.sigma / w),
        noise=Affine(point.d_alpha / w, -point.alpha / w),
        velocity=Affine(zero, zero + 1),
    )


def _from_epsilon(point: PathPoint) -> Estimates:
    """m = x₀: x₁ = (x − σm)/α, v = (α'x − Wm)/α."""
    zero = torch.zeros_like(point.t)
    return Estimates(
        data=Affine(1 / point.alpha, -point.sigma / point.alpha),
        noise=Affine(zero, zero + 1),
        velocity=Affine(point.d_alpha / point.alpha, -point.wronskian / point.alpha),
    )


def _from_score(point: PathPoint) -> Estimates:
    """m = s: x₀ = −σm, the rest as from the noise."""
    data, noise, velocity = (Affine(a, -point.sigma * b) for a, b in _from_epsilon(point))
    return Estimates(data, noise, velocity)


PREDICTIONS: dict[str, Callable[[PathPoint], Estimates]] = {
    "velocity": _from_velocity,
    "epsilon": _from_epsilon,
    "score": _from_score,
}
