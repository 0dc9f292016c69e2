"""Features of small pictures for FD-emoji: a small network trained on the emoji set, loaded from `train/data`.

`python -m train.emoji.train_features` makes the weights. The network is no Inception network: distances between its
features compare models of emoji with each other, and with nothing in a paper.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "emoji-cnn-v1"
WEIGHTS_FILE = Path(__file__).parents[1] / "data" / "features.safetensors"
INPUT_SIZE = 32
MIN_SIZE, MAX_SIZE = 16, 128
# Channels in, channels out, stride of each 3x3 convolution.
LAYERS = ((3, 24, 1), (24, 48, 2), (48, 64, 2), (64, 96, 1), (96, 128, 2), (128, 128, 1))
NUM_FEATURES = LAYERS[-1][1]
# Pictures in one call of the network.
CHUNK = 64
# Half precision of a sampler may put a white pixel this far above 1; anything more is a picture of another range.
TOLERANCE = 0.01
REMAKE = "make weights and card with python -m train.emoji.train_features"


class FeatureExtractor(nn.Module):
    """Six 3x3 convolutions, each with ReLU, and the mean over positions: pictures to (B, 128) float64.

    Everything is computed in double precision, so that features do not depend on what else is in a batch.

    Attributes:
        name: of the network and its treatment of pictures.
        sha256: of the file of weights.
        card: what the program that trained it has written.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, sha256: str, card: Mapping[str, Any] | None = None):
        """Take the weights.

        Args:
            tensors: `convs.i.weight`, `convs.i.bias` for each of `LAYERS`, `head.weight`, `head.bias`.
            name: of the network.
            sha256: of the file they come from, in hexadecimal digits.
            card: facts of the training.

        Raises:
            ValueError: if a tensor is missing, superfluous, not finite or of another shape.
        """
        super().__init__()
        self.name, self.sha256, self.card = name, sha256, dict(card or {})
        check_weights(tensors)
        for key, tensor in tensors.items():
            self.register_buffer(key.replace(".", "_"), tensor.detach().to(torch.float64))

    @property
    def label(self) -> str:
        """Name and the first eight digits of the hash of the weights: `emoji-cnn-v1-0123abcd`."""
        return f"{self.name}-{self.sha256[:8]}"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.buffers()).device

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            pictures: (B, 3, S, S), as for :func:`prepare`.

        Returns:
            (B, 128) float64, on the extractor's device.

        Raises:
            ValueError: if they are not such pictures.
        """
        check_pictures(pictures)
        parts = [self._features(prepare(part.to(self.device))) for part in pictures.split(CHUNK)]
        return torch.cat(parts) if parts else torch.zeros(0, NUM_FEATURES, dtype=torch.float64, device=self.device)

    def _features(self, x: Tensor) -> Tensor:
        buffers = dict(self.named_buffers())
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (_, _, stride) in enumerate(LAYERS):
            x = F.relu(F.conv2d(x, buffers[f"convs_{i}_weight"], buffers[f"convs_{i}_bias"], stride, padding=1))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """What the training's classifier makes of features: (B, 128) to (B, classes)."""
        return F.linear(features, self.head_weight, self.head_bias)  # pyright: ignore[reportArgumentType]


def weight_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file of weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs, _) in enumerate(LAYERS):
        shapes |= {f"convs.{i}.weight": (outputs, inputs, 3, 3), f"convs.{i}.bias": (outputs,)}
    return shapes | {"head.weight": (num_classes, NUM_FEATURES), "head.bias": (num_classes,)}


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of the network.

    Raises:
        ValueError: if a tensor is missing, superfluous, not finite or of another shape.
    """
    classes = len(tensors["head.bias"]) if "head.bias" in tensors and tensors["head.bias"].ndim else 0
    shapes = weight_shapes(classes)
    if different := sorted(set(shapes) ^ set(tensors)):
        raise ValueError(f"the weights are not those of {NAME}: {different[0]} is missing or superfluous; {REMAKE}")
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key} is {tuple(tensors[key].shape)}; {NAME} has {shape}; {REMAKE}")
        if not tensors[key].isfinite().all():
            raise ValueError(f"{key} is not finite; {REMAKE}")


def card_path(weights: Path) -> Path:
    """Where the card of a file of weights lies: beside it, with the suffix .json."""
    return weights.with_suffix(".json")


def load_extractor(path: str | Path | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Read the weights and the card beside them.

    Args:
        path: file of weights; the one that comes with the code by default.
        device: where to compute; it needs double precision.

    Returns:
        The extractor.

    Raises:
        ValueError: if a file is missing or damaged, or the card is of other weights.
    """
    path = WEIGHTS_FILE if path is None else Path(path)
    try:
        content = path.read_bytes()
        card = json.loads(card_path(path).read_text(encoding="utf-8"))
        tensors = load(content)
        name, expected = str(card["name"]), card["sha256"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"no feature extractor in {path} and {card_path(path).name}: {error}; {REMAKE}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != expected:
        raise ValueError(f"{path} has the SHA-256 {sha256}, its card says {expected}; {REMAKE}")
    return FeatureExtractor(tensors, name, sha256, card).to(device)


@lru_cache(maxsize=1)
def default_extractor() -> FeatureExtractor:
    """The extractor that comes with the code, on the CPU, read once."""
    return load_extractor()


def check_pictures(pictures: Tensor) -> None:
    """Refuse what is not a batch of square pictures in colour.

    Raises:
        ValueError: if the shape, size or number format is another, or a value is not finite or beyond [-1, 1].
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise ValueError(f"expected square images (N, 3, S, S), got {tuple(pictures.shape)}")
    if not MIN_SIZE <= pictures.shape[-1] <= MAX_SIZE:
        raise ValueError(f"images have {pictures.shape[-1]} pixels a side; expected {MIN_SIZE} to {MAX_SIZE}")
    if pictures.dtype == torch.uint8:
        return
    if not pictures.is_floating_point():
        raise ValueError(f"images are {pictures.dtype}; expected uint8, or floating point in [-1, 1]")
    if not pictures.isfinite().all():
        broken = int((~pictures.isfinite()).flatten(1).any(dim=1).sum())
        raise ValueError(f"{broken} of {len(pictures)} images hold values that are not finite")
    if pictures.numel() and float(pictures.abs().max()) > 1.0 + TOLERANCE:
        low, high = float(pictures.min()), float(pictures.max())
        raise ValueError(f"images run from {low:.4g} to {high:.4g}; expected [-1, 1]: scale or clamp them")


def prepare(pictures: Tensor) -> Tensor:
    """What the network is shown: the 256 levels of a saved picture, resampled to 32 x 32.

    Floating-point pictures are rounded to whole levels, so that a model's output and the file saved of it have the
    same features. The filter is a triangle as wide as the reduction (bilinear with antialiasing).

    Args:
        pictures: (B, 3, S, S), uint8 or floating point in [-1, 1].

    Returns:
        (B, 3, 32, 32) float64 in [-1, 1].
    """
    levels = pictures.to(torch.float64)
    if pictures.dtype != torch.uint8:
        levels = ((levels + 1.0) * 127.5).round().clamp(0.0, 255.0)
    x = levels / 127.5 - 1.0
    if x.shape[-1] == INPUT_SIZE:
        return x
    return F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False)


def features_of(pictures: Iterable[Tensor] | Tensor, extractor: FeatureExtractor) -> Iterator[Tensor]:
    """Features of a stream of pictures.

    Args:
        pictures: one tensor (N, 3, S, S), or batches (B, 3, S, S) and single pictures (3, S, S) in turn.
        extractor: the network.

    Yields:
        (B, 128) float64, for each element.

    Raises:
        ValueError: if an element is not pictures.
    """
    for batch in [pictures] if isinstance(pictures, Tensor) else pictures:
        if not isinstance(batch, Tensor):
            raise ValueError(f"expected tensors of images, got {type(batch).__name__}")
        yield extractor(batch.unsqueeze(0) if batch.ndim == 3 else batch)


def register_with_torch_fidelity(extractor: FeatureExtractor | None = None) -> str:
    """Make the extractor known to torch-fidelity, for `calculate_metrics(feature_extractor=...)`.

    The name holds the hash of the weights because torch-fidelity caches features by name.

    Args:
        extractor: the network; the one that comes with the code by default.

    Returns:
        The name it is registered under.

    Raises:
        ImportError: if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity import register_feature_extractor  # pyright: ignore[reportMissingImports]
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # pyright: ignore[reportMissingImports]
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("torch-fidelity is not installed: pip install torch-fidelity") from error
    shared = extractor or default_extractor()

    class EmojiFeatureExtractor(FeatureExtractorBase):
        """torch-fidelity's interface to `FeatureExtractor`."""

        def __init__(
            self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
        ) -> None:
            super().__init__(name, features_list)
            if feature_extractor_weights_path is not None:
                raise ValueError(f"{name} is the name of its own weights; register others under theirs")
            self.network = deepcopy(shared)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
            if pictures.dtype != torch.uint8:
                raise ValueError(f"torch-fidelity measures uint8 images, got {pictures.dtype}")
            features = self.network(pictures)
            outputs = {"features": features, "logits": self.network.logits(features)}
            return tuple(outputs[key] for key in self.features_list)

    if shared.label not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(shared.label, EmojiFeatureExtractor)
    return shared.label
