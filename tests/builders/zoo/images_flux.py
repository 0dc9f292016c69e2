"""The FLUX family: packed image tokens after the text, one rotary table for all tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.builders.zoo.base import Grid, Tiny, build, noise, packed, positions, rows, text_mask, times

CHANNELS = 8
TEXT, TEXT_WIDTH = 7, 12
_BLOCKS = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def _build(name: str, **config: Any) -> Callable[[], nn.Module]:
    return build(name, **{**_BLOCKS, **config})


def _packed(grid: Grid, batch: int, seed: int = 0) -> Tensor:
    return packed(grid, batch, CHANNELS, seed)


def _text(batch: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=1)}


def crossed(grid: Grid) -> Grid:
    """Grid of a reference with half the rows and twice the columns of `grid`.

    Its tokens and those of `grid` are together as many as the largest row times the largest column, so positions that
    are read without regard to whose they are give a grid that does not exist.
    """
    return 1, grid[1] // 2, grid[2] * 2


def _flux(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "pooled_projections": noise(batch, 6, seed=2),
        "timestep": times(batch, 1.0),
        "guidance": torch.full((batch,), 3.5),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": positions(grid),
    }


def _kontext(grid: Grid, batch: int) -> dict[str, Any]:
    given = _flux(grid, batch)
    reference = crossed(grid)
    return {
        **given,
        "hidden_states": torch.cat([given["hidden_states"], _packed(reference, batch, seed=3)], 1),
        "img_ids": torch.cat([given["img_ids"], positions(reference, frame=1)]),
    }


def _flux2(grid: Grid, batch: int) -> dict[str, Any]:
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "timestep": times(batch, 1.0),
        "guidance": torch.full((batch,), 4.0),
        "txt_ids": text.expand(batch, -1, -1),
        "img_ids": positions(grid, axes=4).expand(batch, -1, -1),
    }


def _flux2_references(grid: Grid, batch: int) -> dict[str, Any]:
    given = _flux2(grid, batch)
    references = crossed(grid), (1, 3, 5)
    tokens = [_packed(reference, batch, seed=3 + place) for place, reference in enumerate(references)]
    ids = [positions(reference, frame=10 + 10 * place, axes=4) for place, reference in enumerate(references)]
    return {
        **given,
        "hidden_states": torch.cat([given["hidden_states"], *tokens], 1),
        "img_ids": torch.cat([given["img_ids"], *(one.expand(batch, -1, -1) for one in ids)], 1),
    }


def _flux3_ids(grid: Grid, reference: int = 0) -> Tensor:
    ids = positions(grid, axes=4) * torch.tensor([1.0, 0.5, 0.5, 1.0])
    ids[:, 3] = -reference
    return ids


def _flux3(grid: Grid, batch: int) -> dict[str, Any]:
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "timestep": times(batch, 1.0),
        "txt_ids": text,
        "img_ids": _flux3_ids(grid),
    }


def _flux3_references(grid: Grid, batch: int) -> dict[str, Any]:
    references = crossed(grid), (1, 3, 5)
    tokens = [_packed(reference, batch, seed=3 + place) for place, reference in enumerate(references)]
    ids = [_flux3_ids(reference, place) for place, reference in enumerate(references, 1)]
    return {
        **_flux3(grid, batch),
        "image_cond_hidden_states": torch.cat(tokens, 1),
        "image_cond_ids": torch.cat(ids),
    }


def _chroma(grid: Grid, batch: int) -> dict[str, Any]:
    image = torch.ones(batch, math.prod(grid))
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "timestep": times(batch, 1.0),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": positions(grid),
        "attention_mask": torch.cat([text_mask(batch, TEXT, torch.float32), image], 1),
    }


def _bria(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "timestep": times(batch),
        "txt_ids": torch.zeros(batch, TEXT, 3),
        "img_ids": positions(grid),
    }


def _fibo(grid: Grid, batch: int) -> dict[str, Any]:
    layers = _BLOCKS["num_layers"] + _BLOCKS["num_single_layers"]
    image = torch.ones(batch, math.prod(grid), dtype=torch.bool)
    mask = torch.cat([text_mask(batch, TEXT), image], 1)
    return {
        **_bria(grid, batch),
        "text_encoder_layers": [noise(batch, TEXT, 10, seed=5 + layer) for layer in range(layers)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
    }


def _longcat_ids(grid: Grid, kind: int) -> Tensor:
    return positions(grid) + torch.tensor([kind, TEXT, TEXT])


def _longcat(grid: Grid, batch: int) -> dict[str, Any]:
    steps = torch.arange(TEXT).float()
    return {
        "hidden_states": _packed(grid, batch),
        **_text(batch),
        "timestep": times(batch, 1.0),
        "txt_ids": torch.stack([torch.zeros(TEXT), steps, steps], 1),
        "img_ids": _longcat_ids(grid, 1),
    }


def _longcat_edit(grid: Grid, batch: int) -> dict[str, Any]:
    given = _longcat(grid, batch)
    return {
        **given,
        "hidden_states": torch.cat([given["hidden_states"], _packed(grid, batch, seed=3)], 1),
        "img_ids": torch.cat([given["img_ids"], _longcat_ids(grid, 2)]),
    }


def _ovis(grid: Grid, batch: int) -> dict[str, Any]:
    return {**_longcat(grid, batch), "img_ids": positions(grid)}


_FLUX = _build("FluxTransformer2DModel", pooled_projection_dim=6, guidance_embeds=True)
_FLUX2 = _build("Flux2Transformer2DModel", axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16)
_FLUX3 = _build("Flux3Transformer2DModel", axes_dims_rope=(4, 4, 4, 4), timestep_channels=16, cond_in_channels=CHANNELS)
_LONGCAT = _build("LongCatImageTransformer2DModel", pooled_projection_dim=TEXT_WIDTH)

ROWS = rows(
    Tiny("FluxTransformer2DModel", _FLUX, _flux),
    Tiny("FluxTransformer2DModel@kontext", _FLUX, _kontext, note="one reference after the image, ids[..., 0] = 1"),
    Tiny(
        "Flux2Transformer2DModel", _FLUX2, _flux2, note="ids with an axis of samples; single blocks have one projection"
    ),
    Tiny(
        "Flux2Transformer2DModel@references",
        _FLUX2,
        _flux2_references,
        note="two references of two sizes after the image, ids[..., 0] = 10, 20",
    ),
    Tiny(
        "Flux3Transformer2DModel",
        _FLUX3,
        _flux3,
        note="rows and columns of ids are halves; text and image have self-attention blocks of their own first",
    ),
    Tiny(
        "Flux3Transformer2DModel@references",
        _FLUX3,
        _flux3_references,
        note="references in image_cond_hidden_states, after the image in the joint sequence, ids[..., 3] = -1, -2",
    ),
    Tiny(
        "ChromaTransformer2DModel",
        _build("ChromaTransformer2DModel", approximator_num_channels=16, approximator_hidden_dim=32),
        _chroma,
        note="the pipeline's mask is 0 and 1 as floats, so it is added: 1 on every pair of tokens that count",
    ),
    Tiny("BriaTransformer2DModel", _build("BriaTransformer2DModel"), _bria, note="time from 0 to 1000"),
    Tiny(
        "BriaFiboTransformer2DModel",
        _build("BriaFiboTransformer2DModel", text_encoder_dim=10),
        _fibo,
        note="mask (batch, 1, 1, tokens) in joint_attention_kwargs; time from 0 to 1000",
    ),
    Tiny(
        "LongCatImageTransformer2DModel", _LONGCAT, _longcat, note="rows and columns of ids start at the text's length"
    ),
    Tiny(
        "LongCatImageTransformer2DModel@edit",
        _LONGCAT,
        _longcat_edit,
        note="one reference of the same size after the image; ids[..., 0] is 1 for the image, 2 for the reference",
    ),
    Tiny("OvisImageTransformer2DModel", _build("OvisImageTransformer2DModel", out_channels=CHANNELS), _ovis),
)
