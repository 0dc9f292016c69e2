"""DINOv2 and CLIP as feature extractors, from transformers: a hub id or a folder.

DINOv2's features are those of torch-fidelity's extractor (its own resizing, the class token), which takes its network
from a repository that has to be downloaded and run; transformers has the same network as a class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.metrics.inception import Extractor, hash_of

DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14-336"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DINOV2_SIZE = 224


class HubExtractor(Extractor):
    """A network of transformers, in single precision."""

    keys = ("features",)
    kind: str

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        """Load the weights.

        Args:
            name: hub id or folder.
            device: where to compute.

        Raises:
            ValueError: if it is no such network.
            OSError: if it is not there and cannot be downloaded.
            ImportError: without transformers.
        """
        self.network = self._load(name).to(device).eval().requires_grad_(False)
        self._device = device
        self.sha256 = hash_of({key: tensor.cpu() for key, tensor in self.network.state_dict().items()})
        self.label = f"{self.kind}-{self.sha256[:8]}"
        self.metric, self.kernel_metric = f"FD-{self.kind}[{self.label}]", f"KD-{self.kind}[{self.label}]"

    def _load(self, name: str) -> Any:
        raise NotImplementedError


def load(cls: Any, name: str, kind: str) -> Any:
    """A network of transformers, as a class of it.

    Raises:
        ValueError: if the weights are of another kind.
        OSError: if they are not there and cannot be downloaded.
    """
    model, found = cls.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"{name} holds no weights of {cls.__name__} ({sorted(found['missing_keys'])[0]} is missing); "
            f"--extractor {kind}=NAME takes a folder or hub id that does"
        )
    return model


class DinoExtractor(HubExtractor):
    """The class token of DINOv2 (Oquab et al., arXiv 2304.07193)."""

    kind = "dinov2"
    preprocessing = f"uint8, {DINOV2_SIZE} x {DINOV2_SIZE} as TensorFlow 1 (bilinear, not antialiased), ImageNet's mean"

    def _load(self, name: str) -> Any:
        from transformers import Dinov2Model

        return load(Dinov2Model, name, self.kind)

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        pixels = interpolate_bilinear_2d_like_tensorflow1x(
            pictures.to(self._device, torch.float32), size=(DINOV2_SIZE, DINOV2_SIZE), align_corners=False
        )
        return {"features": self.network(_normalised(pixels, IMAGENET)).pooler_output}


class ClipExtractor(HubExtractor):
    """CLIP's image embedding (Radford et al., arXiv 2103.00020), of length 1, as CMMD takes it (arXiv 2401.09603)."""

    kind = "clip"

    def _load(self, name: str) -> Any:
        from transformers import CLIPVisionModelWithProjection

        network = load(CLIPVisionModelWithProjection, name, self.kind)
        self.side = int(network.config.image_size)
        self.preprocessing = f"uint8, {self.side} x {self.side} bicubic, antialiased; CLIP's mean; length 1"
        return network

    def _features(self, pictures: Tensor) -> dict[str, Tensor]:
        pixels = torch.nn.functional.interpolate(
            pictures.to(self._device, torch.float32), size=(self.side, self.side), mode="bicubic", antialias=True
        ).clamp(0, 255)
        embedding = self.network(_normalised(pixels, OPENAI)).image_embeds
        return {"features": embedding / embedding.norm(dim=1, keepdim=True)}


def _normalised(pixels: Tensor, of: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (255 * torch.tensor(values, device=pixels.device)[:, None, None] for values in of)
    return (pixels - mean) / deviation
