"""The tables of docs/models.md, made of the rows: `python -m tests.hosts.models_table` prints them.

With `--write` it puts them there.
"""

import sys
from pathlib import Path

from attngen.hosts.families import FAMILIES, STAYS
from attngen.methods import METHOD_CLASSES
from tests.builders.zoo import APART, ZOO

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = "| class | host | text | methods | grid | tokens at its usual size | share | at most |"
EXACT = "| class that stays exact | why |"

SIZES: dict[str, tuple[int, int, int]] = {
    "DiTTransformer2DModel": (256, 0, 1152),
    "PixArtTransformer2DModel": (4096, 0, 1152),
    "SD3Transformer2DModel": (4096, 333, 2432),
    "FluxTransformer2DModel": (4096, 512, 3072),
    "Flux2Transformer2DModel": (4096, 512, 6144),
    "Flux3Transformer2DModel": (4096, 512, 3072),
    "ZImageTransformer2DModel": (4096, 128, 3840),
    "ZImageControlNetModel": (4096, 128, 3840),
    "QwenImageTransformer2DModel": (6889, 200, 3072),
    "QwenImageControlNetModel": (4096, 200, 3072),
    "QwenImage21Transformer2DModel": (4096, 200, 4096),
    "NucleusMoEImageTransformer2DModel": (4096, 200, 2048),
    "ChromaTransformer2DModel": (4096, 512, 3072),
    "BriaTransformer2DModel": (4096, 128, 3072),
    "BriaFiboTransformer2DModel": (4096, 3000, 3072),
    "BriaFibo2Transformer2DModel": (4096, 256, 3584),
    "OvisImageTransformer2DModel": (4096, 256, 3072),
    "FluxControlNetModel": (4096, 512, 3072),
    "LongCatImageTransformer2DModel": (4096, 512, 3072),
    "HiDreamImageTransformer2DModel": (4096, 384, 2560),
    "Ideogram4Transformer2DModel": (16384, 512, 4608),
    "OmniGenTransformer2DModel": (4096, 100, 3072),
    "JoyImageEditTransformer3DModel": (4096, 4608, 3072),
    "LuminaNextDiT2DModel": (4096, 0, 2304),
    "Krea2Transformer2DModel": (4096, 512, 6144),
    "AuraFlowTransformer2DModel": (4096, 256, 3072),
    "CogView3PlusTransformer2DModel": (4096, 224, 2560),
    "CogView4Transformer2DModel": (4096, 512, 2560),
    "GlmImageTransformer2DModel": (4096, 512, 2560),
    "Lumina2Transformer2DModel": (4096, 256, 2304),
    "HunyuanImageTransformer2DModel": (4096, 1000, 3584),
    "HunyuanDiT2DModel": (4096, 0, 1408),
    "HunyuanDiT2DControlNetModel": (4096, 0, 1408),
    "ErnieImageTransformer2DModel": (4096, 256, 3072),
    "PRXTransformer2DModel": (4096, 256, 1792),
    "SD3ControlNetModel": (4096, 333, 1536),
    "WanTransformer3DModel": (32760, 0, 5120),
    "WanVACETransformer3DModel": (32760, 0, 5120),
    "WanAnimateTransformer3DModel": (75600, 0, 5120),
    "SkyReelsV2Transformer3DModel": (51000, 0, 5120),
    "AnyFlowTransformer3DModel": (32760, 0, 5120),
    "CosmosTransformer3DModel": (56320, 0, 4096),
    "CosmosControlNetModel": (56320, 0, 4096),
    "AllegroTransformer3DModel": (79200, 0, 2304),
    "LTXVideoTransformer3DModel": (7392, 0, 2048),
    "LTX2VideoTransformer3DModel": (6144, 0, 4096),
    "HunyuanVideoTransformer3DModel": (118800, 256, 3072),
    "HunyuanVideo15Transformer3DModel": (111600, 1000, 2048),
    "MotifVideoTransformer3DModel": (114080, 512, 3072),
    "EasyAnimateTransformer3DModel": (13312, 512, 3072),
    "MochiTransformer3DModel": (44520, 256, 3072),
    "CogVideoXTransformer3DModel": (17550, 226, 3072),
    "ConsisIDTransformer3DModel": (17550, 226, 3072),
    "Kandinsky5Transformer3DModel": (47616, 0, 1792),
    "LatteTransformer3DModel": (1024, 0, 1152),
}
"""Tokens of the image, other tokens of the sequence and width, at the size that a pipeline or a paper has by default.

From pipelines' defaults, autoencoders and patches; widths and some sizes from published configurations. Nothing was
downloaded. UNets have several grids, and models with a history or references no usual size.
"""


def share(tokens: int, others: int, width: int) -> float:
    """Attention's part of the multiplications of a block: N / (6 C + N), N tokens in all, of C channels."""
    return (tokens + others) / (6 * width + tokens + others)


def methods_of(name: str) -> str:
    """The methods that can act, by what the others lack; `softmax` is none."""
    family, lacking = FAMILIES[name], []
    for kind, method in METHOD_CLASSES.items():
        if (family.rotary and not method.supports_rotary) or (family.core is not None and method.needs_tokens):
            lacking.append(kind)
    return f"all but {', '.join(lacking)}" if lacking else "all"


def grid_of(name: str) -> str:
    """The axes of the grid, by the sizes of the tiny models: videos of the zoo have frames."""
    frames = max(tiny.grids[0][0] for tiny in {**ZOO, **APART}.values() if tiny.cls == name) if name in KNOWN else 1
    apart = FAMILIES[name].spatial_block is not None or name in ("LatteTransformer3DModel", *LEVELS)
    return "frames × height × width" if frames > 1 and not apart else "height × width"


KNOWN = {tiny.cls for tiny in {**ZOO, **APART}.values()}
LEVELS = tuple(name for name, family in FAMILIES.items() if family.core is not None and family.core.levels)


def line(name: str) -> str:
    """One row of the table."""
    family = FAMILIES[name]
    text = family.core.text if family.core is not None else {True: "first", False: "last"}[family.rotary]
    if family.core is None and family.text is None:
        text = "none"
    host = "layer" if family.core is None else "core"
    cells = [f"`{name}`", host, text, methods_of(name), grid_of(name)]
    if name in SIZES:
        tokens, others, width = SIZES[name]
        part = share(tokens, others, width)
        cells += [f"{tokens:,}" + (f" + {others:,}" if others else ""), f"{part:.0%}", f"{1 / (1 - part):.2f}×"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(cells)} |"


def tables() -> dict[str, str]:
    """The tables by their header: all rows, and the classes that stay exact."""
    stay = [f"| `{name}` | {reason} |" for name, reason in STAYS.items()]
    return {
        HEADER: "\n".join([HEADER, "|---" * 8 + "|", *map(line, FAMILIES)]),
        EXACT: "\n".join([EXACT, "|---|---|", *stay]),
    }


def replaced(page: str) -> str:
    """The page with its tables made anew."""
    lines = page.split("\n")
    for header, table in tables().items():
        start = lines.index(header)
        stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        lines[start:stop] = table.split("\n")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))
