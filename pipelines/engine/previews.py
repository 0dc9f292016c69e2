"""Small pictures of what a pipeline is drawing, without its VAE: cheap enough for every step."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SIDE = 256  # of a preview, in pixels, at most; smaller ones are enlarged to about this
PATCHES, PATCH = 16, 8  # a side of the picture the colours are fitted on: so many squares of so many latent pixels

_COLOURS: weakref.WeakKeyDictionary[Any, Tensor | None] = weakref.WeakKeyDictionary()


class Previewer:
    """Turns the latents after a step into a picture.

    From two latents in a row it works out where they lead, which shows the picture long before the noise is gone; the
    first step, and samplers it does not know, show the latents themselves. Colours come from a linear map that is
    fitted once, on what the VAE makes of smooth colours.

    Args:
        pipe: the pipeline.
        size: (height, width) of the picture in pixels, for latents that are a row of tokens.
    """

    def __init__(self, pipe: Any, size: tuple[int, int] | None) -> None:
        self.pipe, self.size = pipe, size
        self._last: tuple[Tensor, tuple[float, float]] | None = None

    def draw(self, index: int, latents: Tensor) -> Image.Image | None:
        """A small picture of the first of the latents after step `index`; None where they cannot be shown."""
        import torch

        with torch.no_grad():
            current = self._as_grid(latents.detach()[:1])
            if current is None:
                return None
            current = current.float().cpu()
            scales = noise_scales(self.pipe.scheduler, index + 1)
            final = self._final(current, scales)
            if scales is not None:
                self._last = current, scales
            pixels = None if final is None else to_pixels(self.pipe, final)
            return None if pixels is None else _as_image(pixels)

    def _as_grid(self, latents: Tensor) -> Tensor | None:
        if latents.ndim == 4:
            return latents
        unpack = getattr(self.pipe, "_unpack_latents", None)
        if latents.ndim != 3 or unpack is None or self.size is None:
            return None
        return unpack(latents, *self.size, self.pipe.vae_scale_factor)

    def _final(self, current: Tensor, scales: tuple[float, float] | None) -> Tensor | None:
        """Where two latents x = a · picture + s · noise lead, if picture and noise are the same in both.

        None for two latents of one time, which is how a solver of two calls corrects itself.
        """
        last = self._last
        if last is None or scales is None or last[0].shape != current.shape:
            return current
        (before, (a1, s1)), (a2, s2) = last, scales
        determinant = a2 * s1 - a1 * s2
        if abs(determinant) < 1e-6:
            return None
        return (s1 * current - s2 * before) / determinant


def noise_scales(scheduler: Any, index: int) -> tuple[float, float] | None:
    """(a, s) of latents = a · picture + s · noise before step `index` (after the last: of the result).

    None for a sampler that is not known to be of this form, or that draws noise at every step.
    """
    from attngen import InterpolantScheduler

    if isinstance(scheduler, InterpolantScheduler):
        if scheduler.config["path"] != "linear" or scheduler.config["sampler"] != "ode":
            return None
        times = scheduler.timesteps
        time = float(times[index]) if index < len(times) else 1.0
        return time, 1 - time
    name = type(scheduler).__name__
    if any(word in name for word in ("Ancestral", "SDE", "DDPM", "Heun", "LCM", "TCD")):
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        sigma = float(sigmas[index]) if index < len(sigmas) else 0.0
        if "FlowMatch" in name:
            return 1 - sigma, sigma
        convert = getattr(scheduler, "_sigma_to_alpha_sigma_t", None)
        if convert is None:
            return 1.0, sigma
        return tuple(float(x) for x in convert(sigmas.new_tensor(sigma)))  # pyright: ignore[reportReturnType]
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        return None
    timesteps = scheduler.timesteps
    kept = float(products[int(timesteps[index])]) if index < len(timesteps) else 1.0
    return kept**0.5, (1 - kept) ** 0.5


def to_pixels(pipe: Any, latents: Tensor) -> Tensor | None:
    """(1, C, h, w) latents -> (h, w, 3) in [0, 1], or None."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        shown = latents[0, :3] if latents.shape[1] >= 3 else latents[0, :1].expand(3, -1, -1)
        return (shown / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    matrix = colours_of(vae)
    if matrix is None or matrix.shape[0] != latents.shape[1] + 1:
        return None
    pixels = latents[0].permute(1, 2, 0)
    return (pixels @ matrix[:-1] + matrix[-1]).clamp(0, 1)


def colours_of(vae: Any) -> Tensor | None:
    """(C + 1, 3): what turns a VAE's scaled latents, with a 1 behind them, into RGB; fitted once.

    Least squares over what it encodes smooth random colours to. None where the VAE cannot be asked.
    """
    import torch
    import torch.nn.functional as F

    from attngen.sit.latents import normalize_latents

    if vae in _COLOURS:
        return _COLOURS[vae]
    matrix = None
    try:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 3, PATCHES // 4, PATCHES // 4, generator=generator)
        parameter = next(vae.parameters())
        wide = F.interpolate(coarse, size=(PATCHES * PATCH,) * 2, mode="bilinear")
        with torch.no_grad():
            pixels = (2 * wide - 1).to(parameter.device, parameter.dtype)
            encoded = vae.encode(pixels)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
        scaled = normalize_latents(latents.float().cpu(), vae.config)[0]
        rows = torch.cat([scaled.flatten(1).T, torch.ones(scaled[0].numel(), 1)], dim=1)
        colours = F.interpolate(coarse, size=tuple(scaled.shape[-2:]), mode="bilinear")[0].flatten(1).T
        # A little ridge: an untrained or nearly flat VAE has directions that say nothing.
        normal = rows.T @ rows + 1e-3 * torch.eye(rows.shape[1])
        matrix = torch.linalg.solve(normal, rows.T @ colours)
        matrix = matrix if bool(torch.isfinite(matrix).all()) else None
    except (RuntimeError, AttributeError, TypeError, ValueError, StopIteration):
        pass  # a preview is a courtesy: without it the picture comes all the same
    _COLOURS[vae] = matrix
    return matrix


def _as_image(pixels: Tensor) -> Image.Image:
    from PIL import Image

    image = Image.fromarray((pixels.nan_to_num() * 255).round().byte().numpy())
    scale = SIDE / max(image.size)
    if scale > 1:
        whole = max(1, round(scale))
        return image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR)
