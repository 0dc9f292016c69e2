"""Picture files to square RGB arrays, the way the field's reference numbers were made.

The crop is that of ADM (arXiv 2105.05233), which DiT and SiT use too: halve by box averaging while the short side stays
at least the size wanted, shrink the rest bicubically, cut out the middle.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image

# Only formats Pillow decodes by itself: others, such as EPS, would start a program on the data.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow's own bound for a warning; a larger picture is an attack or a mistake, and is not decoded.
MAX_PIXELS = 89_478_485
CROP = "adm-center"

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(file: BinaryIO, size: int) -> np.ndarray:
    """Decode a picture file and cut out its middle.

    Args:
        file: an open file, or bytes in `io.BytesIO`.
        size: side of the result, in pixels.

    Returns:
        uint8 (3, size, size), RGB; transparent parts are white, an EXIF orientation is applied.

    Raises:
        ValueError: if it is not a picture, is damaged, or has over `MAX_PIXELS` pixels before or after scaling.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_pixels(image.width, image.height)
            image.load()
            cropped = center_crop(to_rgb(upright(image)), size)
    except Exception as error:  # what Pillow's decoders raise on damaged files is not one family
        raise ValueError(_reason(error)) from error
    return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, scaled to `size` x `size` pixels (ADM's crop, arXiv 2105.05233).

    Raises:
        ValueError: if the picture is so narrow that the scaled one would have over `MAX_PIXELS` pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixels(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF in a good picture: viewers show it as stored, and so do we
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB on white, from any mode with a known range.

    Raises:
        ValueError: for floating-point pictures and for integers beyond 16 bits, whose white is not defined.
    """
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; convert the image to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey 16-bit values to 8 bits: Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"integer pixels from {low} to {high} exceed 16 bits; convert the image to 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}")


def _reason(error: Exception) -> str:
    """One line for a message, without Pillow's mention of the Python object it read from."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return " ".join(str(error).split()) or type(error).__name__
