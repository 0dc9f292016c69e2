"""The networks whose features are compared: torch-fidelity's InceptionV3, and the small one for emoji.

Features are computed for a fixed number of pictures at a time, the last part filled up, because a convolution rounds
differently for another number: so a picture has the same features whatever is measured with it.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.emoji.features import MAX_SIZE, MIN_SIZE, FeatureExtractor, default_extractor

INCEPTION = "inception-v3-compat"
# Pictures in one call.
GROUP = 16
# ADM's sFID: the first channels of what TensorFlow's graph calls mixed_6/conv, after its ReLU, at every position.
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7


class Extractor:
    """What the measurements ask of a network.

    Attributes:
        label: name and first digits of the hash, as in our statistics files.
        sha256: of the weights.
        preprocessing: what is done to pictures, for the cache.
        metric: the distances' names, "FID", or "FD-emoji[…]" of another network.
        keys: tensors that it gives.
    """

    label: str
    sha256: str
    preprocessing: str
    metric: str
    kernel_metric: str
    keys: tuple[str, ...]

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError for pictures that it cannot take."""

    def features(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Features of pictures.

        Args:
            pictures: uint8 (B, 3, H, W), at most `GROUP`.

        Returns:
            By name: "features" (B, D), "logits" (B, classes), and of Inception "spatial" (B, 2023).
        """
        count = len(pictures)
        filled = np.concatenate([pictures, np.repeat(pictures[-1:], GROUP - count, axis=0)])
        with torch.no_grad():
            return {key: tensor[:count].cpu() for key, tensor in self._features(torch.from_numpy(filled)).items()}

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class EmojiExtractor(Extractor):
    """The network that ships, in double precision."""

    preprocessing = "uint8, 32 x 32 by an antialiased triangle"
    keys = ("features", "logits")

    def __init__(self, network: FeatureExtractor | None = None, device: str | torch.device = "cpu") -> None:
        self.network = (network or default_extractor()).to(device)
        self.label, self.sha256 = self.network.label, self.network.sha256
        self.metric, self.kernel_metric = f"FD-emoji[{self.label}]", f"KD-emoji[{self.label}]"

    def check_size(self, size: tuple[int, int]) -> None:
        if size[0] != size[1] or not MIN_SIZE <= size[0] <= MAX_SIZE:
            raise ValueError(
                f"images have {size[1]} x {size[0]} pixels; the emoji extractor takes squares of {MIN_SIZE} to "
                f"{MAX_SIZE}: give --image-size, or --extractor inception"
            )

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.network(pictures)
        return {"features": features, "logits": self.network.logits(features)}


class InceptionExtractor(Extractor):
    """torch-fidelity's InceptionV3, the weights of the TensorFlow graph of 2015, in single precision."""

    preprocessing = "uint8, 299 x 299 as TensorFlow 1 (bilinear, not antialiased)"
    metric, kernel_metric = "FID", "KID"
    keys = ("features", "spatial", "logits")

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        """Load the weights.

        Args:
            weights: a .pth or .safetensors file in torch-fidelity's layout; None downloads torch-fidelity's own.
            device: where to compute.

        Raises:
            ValueError: if the file is not such weights.
            OSError: if they cannot be downloaded.
            ImportError: if torch-fidelity is not installed.
        """
        state = read_weights(Path(weights) if weights is not None else download_weights())
        self.sha256 = hash_of(state)
        self.label = f"{INCEPTION}-{self.sha256[:8]}"
        self.network = _build(state, weights).to(device)
        self._device = device
        self._spatial: Tensor | None = None
        self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        # In TensorFlow's order, positions before channels, as in the statistics that ADM publishes.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(pictures.to(self._device))
        assert self._spatial is not None
        return {"features": features, "spatial": self._spatial, "logits": logits}


def _build(state: Mapping[str, Tensor], name: Any) -> Any:
    """torch-fidelity's network with these weights.

    Its class reads a file, or downloads; what it is given here is a file in memory of weights that were read safely.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    content = io.BytesIO()
    torch.save(dict(state), content)
    content.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw weights before they are loaded
            return FeatureExtractorInceptionV3(
                INCEPTION,
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=content,  # pyright: ignore[reportArgumentType]
            )
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[1:2] or [str(error)]
        raise ValueError(f"{name} holds no weights of torch-fidelity's InceptionV3: {reason[0].strip()}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without running anything in it.

    Raises:
        ValueError: if it cannot be read, or holds something else than tensors by name.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise their own kinds
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no tensors by name; expected torch-fidelity's InceptionV3 weights")
    return state


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, whatever the file's format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def download_weights() -> Path:
    """torch-fidelity's own weights, in torch.hub's cache, where torch-fidelity keeps them too; checked by their hash.

    Raises:
        OSError: if they are not there and cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    prefix = Path(name).stem.rsplit("-", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found.startswith(prefix):
            return path
        print(f"train.fid: {path} is damaged and is downloaded again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except Exception as error:  # of urllib, of sockets, or a wrong hash
        raise OSError(
            f"cannot download Inception's weights from {URL_INCEPTION_V3} ({error}); give them by "
            "--inception-weights FILE, or measure with --extractor emoji"
        ) from error
    return path
