"""Draw every emoji of a font into one file, ``train/data/emoji.zip``, which :mod:`train.emoji.dataset` reads.

The names, groups and code points come from Unicode's ``emoji-test.txt``, the pictures from Noto Color Emoji.
The same font and list give the same bytes. Run it as ``python -m train.emoji.build``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import cli

if TYPE_CHECKING:
    from PIL import Image, ImageFont

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
DEFAULT_EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"

FORMAT = "attngen-emoji"
VERSION = 1

# The font holds bitmaps of this one size only; FreeType refuses every other.
FONT_SIZE = 109
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
COLUMNS = 64
WEBP_MAX_SIDE = 16383

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
NONCHARACTER = chr(0x10FFFF)  # in no font: drawn as the box that stands for a missing picture
VARIATION_SELECTOR, JOINER = 0xFE0F, 0x200D
GENDER_SIGNS = frozenset((0x2640, 0x2642))
ADULT, MAN_OR_WOMAN = 0x1F9D1, frozenset((0x1F468, 0x1F469))

# Sequences that draw what a single code point draws as well (two hands that shake, couples).
SAME_PICTURE = {
    (0x1FAF1, JOINER, 0x1FAF2): (0x1F91D,),
    (ADULT, JOINER, 0x2764, JOINER, ADULT): (0x1F491,),
    (ADULT, JOINER, 0x2764, JOINER, 0x1F48B, JOINER, ADULT): (0x1F48F,),
    (ADULT, JOINER, 0x1F91D, JOINER, ADULT): (0x1F46B,),
    (0x1F46C,): (0x1F46B,),
    (0x1F46D,): (0x1F46B,),
}

ENTRY = re.compile(r"^([0-9A-F ]+?) *; fully-qualified *# \S+ E\d+\.\d+ (.+)$")


def base_codepoints(codepoints: list[int]) -> list[int]:
    """The emoji of which this one is a variant: without skin tone, variation selector and gender.

    A man, a woman and a person of the same job share a base, and so do all skin tones of a sign made with the hand.

    Args:
        codepoints: Code points of a fully-qualified emoji.

    Returns:
        Code points; equal for emoji that differ by skin tone or gender only.
    """
    plain = [c for c in codepoints if c not in SKIN_TONES and c != VARIATION_SELECTOR]
    while len(plain) > 2 and plain[-2] == JOINER and plain[-1] in GENDER_SIGNS:
        plain = plain[:-2]
    if JOINER in plain:
        plain = [ADULT if c in MAN_OR_WOMAN else c for c in plain]
    return list(SAME_PICTURE.get(tuple(plain), tuple(plain)))


def read_emoji_test(path: str | Path) -> tuple[str, list[dict]]:
    """Read the fully-qualified emoji of an ``emoji-test.txt``.

    Args:
        path: Path of the file.

    Returns:
        The Unicode version, and one dictionary per emoji with the keys ``codepoints`` (list of integers), ``char``,
        ``name``, ``group``, ``subgroup`` and ``base`` (list of integers), in the order of the file.

    Raises:
        ValueError: If the file has no version line or no emoji.
    """
    version, group, subgroup, entries = "", "", "", []
    # A file of another kind need not be UTF-8; it is refused below, with its name.
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# Version:"):
            version = line.partition(":")[2].strip()
        elif line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif match := ENTRY.match(line):
            codepoints = [int(c, 16) for c in match[1].split()]
            entries.append(
                {
                    "codepoints": codepoints,
                    "char": "".join(map(chr, codepoints)),
                    "name": match[2].strip(),
                    "group": group,
                    "subgroup": subgroup,
                    "base": base_codepoints(codepoints),
                }
            )
    if not version or not entries:
        raise ValueError(f"{path} is not an emoji-test.txt: expected a '# Version:' line and fully-qualified emoji")
    return version, entries


def load_font(path: str | Path) -> ImageFont.FreeTypeFont:
    """Open the colour font with the layout engine that joins code points into one glyph.

    Args:
        path: Path of ``NotoColorEmoji.ttf``.

    Returns:
        The font at the one size it holds.

    Raises:
        ValueError: If this Pillow has no RAQM, or the file is not a font with bitmaps of that size.
    """
    from PIL import ImageFont, features

    if not features.check("raqm"):
        raise ValueError(
            "this Pillow has no RAQM layout engine, without which joined emoji fall apart; install libraqm0"
        )
    try:
        return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"{path} is not a font with {FONT_SIZE}-pixel colour bitmaps: {error}") from error


def render(char: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """Draw one emoji on white.

    Args:
        char: The emoji, one or several code points.
        font: A font from :func:`load_font`.
        size: Side of the picture, in pixels.

    Returns:
        An RGB picture of `size` x `size`, or None if the font has no single picture for this emoji.
    """
    from PIL import Image, ImageDraw

    # An emoji that the font does not know is drawn as its parts, side by side, so it is wider; or it is empty.
    if font.getlength(char) > GLYPH_WIDTH + 1:
        return None
    glyph = Image.new("RGBA", (GLYPH_WIDTH, GLYPH_HEIGHT), (0, 0, 0, 0))
    ImageDraw.Draw(glyph).text((0, 0), char, font=font, embedded_color=True)
    if glyph.getchannel("A").getextrema()[1] == 0:
        return None
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    # "RGBa" is premultiplied: hidden colours of transparent pixels cannot bleed into the edge.
    small = square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", small.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, small).convert("RGB")


def render_all(
    entries: list[dict], font: ImageFont.FreeTypeFont, size: int
) -> tuple[list[dict], list[Image.Image], dict[str, int]]:
    """Draw all emoji, leaving out those that the font lacks and those that look like an earlier one.

    Args:
        entries: Emoji from :func:`read_emoji_test`.
        font: A font from :func:`load_font`.
        size: Side of a picture, in pixels.

    Returns:
        The kept entries, their pictures in the same order, and the numbers of emoji ``missing`` and ``duplicate``.
    """
    from tqdm import tqdm

    placeholder = render(NONCHARACTER, font, size)
    kept, pictures, seen = [], [], set()
    left_out = {"missing": 0, "duplicate": 0}
    for entry in tqdm(entries, desc="drawing emoji", disable=None):
        picture = render(entry["char"], font, size)
        if picture is None or picture == placeholder:
            left_out["missing"] += 1
            continue
        digest = hashlib.sha256(picture.tobytes()).digest()
        if digest in seen:
            left_out["duplicate"] += 1
            continue
        seen.add(digest)
        kept.append(entry)
        pictures.append(picture)
    return kept, pictures, left_out


def make_atlas(pictures: list[Image.Image], size: int) -> bytes:
    """Lay the pictures out row by row, `COLUMNS` to a row, and encode them as lossless WebP.

    Args:
        pictures: RGB pictures of `size` x `size`.
        size: Side of a picture, in pixels.

    Returns:
        The bytes of the WebP file.
    """
    from PIL import Image

    rows = -(-len(pictures) // COLUMNS)
    assert max(COLUMNS, rows) * size <= WEBP_MAX_SIDE
    atlas = Image.new("RGB", (COLUMNS * size, rows * size), (255, 255, 255))
    for index, picture in enumerate(pictures):
        atlas.paste(picture, (index % COLUMNS * size, index // COLUMNS * size))
    stream = io.BytesIO()
    atlas.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """Write a zip file whose bytes depend on nothing but the members, and put it in place in one step.

    Args:
        path: Path of the zip file; its folder is made if missing.
        members: Contents by name; WebP is stored, the rest deflated.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_STORED if name.endswith(".webp") else zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix on every machine, or the bytes would differ
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, compresslevel=9)
    from pipelines.images import write_file

    write_file(path, stream.getvalue())


def build(
    font_path: str | Path, emoji_test: str | Path, out: str | Path, size: int = 64, skin_tones: bool = True
) -> dict[str, int]:
    """Build the data file.

    Args:
        font_path: Path of ``NotoColorEmoji.ttf``.
        emoji_test: Path of ``emoji-test.txt``.
        out: Path of the zip file to write.
        size: Side of a picture, in pixels.
        skin_tones: Whether to draw the variants with a skin tone, half of all emoji.

    Returns:
        The numbers of emoji ``kept``, ``missing`` in the font and left out as ``duplicate``, and the ``bytes`` written.

    Raises:
        ValueError: If the font, the list or this Pillow cannot be used.
    """
    unicode_version, entries = read_emoji_test(emoji_test)
    if not skin_tones:
        entries = [entry for entry in entries if SKIN_TONES.isdisjoint(entry["codepoints"])]
    kept, pictures, left_out = render_all(entries, load_font(font_path), size)
    if not kept:
        raise ValueError(f"{font_path} holds none of the emoji of {emoji_test}")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "columns": COLUMNS,
        "unicode": unicode_version,
        "font_sha256": hashlib.sha256(Path(font_path).read_bytes()).hexdigest(),
        "emoji": kept,
    }
    members = {
        "atlas.webp": make_atlas(pictures, size),
        "emoji.json": (json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n").encode(),
        "OFL-1.1.txt": (ROOT / "LICENSES" / "OFL-1.1.txt").read_bytes(),
        "UNICODE.txt": (ROOT / "LICENSES" / "Unicode.txt").read_bytes(),
    }
    write_archive(Path(out), members)
    return {"kept": len(kept), **left_out, "bytes": Path(out).stat().st_size}


def picture_size(text: str) -> int:
    """Parse ``--size``: 8 to 128 pixels, since the font's own pictures are 136 pixels wide."""
    size = int(text)
    if not 8 <= size <= 128:
        raise argparse.ArgumentTypeError(f"expected 8 to 128 pixels, got {size}")
    return size


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser("train.emoji.build", "Draw the emoji data set.")
    parser.add_argument("--font", default=DEFAULT_FONT, help="colour emoji font (default: %(default)s)")
    parser.add_argument("--emoji-test", default=DEFAULT_EMOJI_TEST, help="Unicode's list (default: %(default)s)")
    parser.add_argument("--out", default=ROOT / "train" / "data" / "emoji.zip", type=Path, help="zip file to write")
    parser.add_argument("--size", default=64, type=picture_size, help="side of a picture in pixels (default: 64)")
    parser.add_argument("--no-skin-tones", action="store_true", help="leave out the variants with a skin tone")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0, or 2 if an input is missing or cannot be used.
    """
    args = parse_arguments(argv)
    needed = ((args.font, "fonts-noto-color-emoji"), (args.emoji_test, "unicode-data"))
    for path, package in needed:
        if not Path(path).is_file():
            print(f"{path} does not exist; the Debian package {package} holds such a file.", file=sys.stderr)
            return 2
    try:
        counts = build(args.font, args.emoji_test, args.out, args.size, not args.no_skin_tones)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{args.out}: {counts['kept']} emoji of {args.size} pixels, {counts['bytes'] / 1e6:.1f} MB; "
        f"left out {counts['duplicate']} duplicates and {counts['missing']} that the font lacks"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
