"""Corruptions of images in five severities, after ImageNet-C (Hendrycks and Dietterich 2019).

Strengths are relative to the image's side, so that they look alike on 32 and on 500 pixels. They are not ImageNet-C's,
which was made for 224.
"""

from collections.abc import Callable

import torch
from torchvision.transforms.v2 import functional as F

from koclip.config import check

_Corruption = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]  # of an image and a severity, 0 to 4
SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    deviation = 255 * (0.04, 0.08, 0.12, 0.18, 0.26)[severity]
    noisy = image + deviation * torch.randn(image.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def _blur(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    relative = (0.004, 0.008, 0.012, 0.018, 0.026)[severity]
    sigma = 0.4 + relative * min(image.shape[1:])  # a kernel below 0.4 pixels changes nothing
    height, width = image.shape[1:]
    radii = [min(max(1, round(3 * sigma)), side - 1) for side in (width, height)]  # one row alone is not blurred
    blurred: torch.Tensor = F.gaussian_blur(image, [2 * radius + 1 for radius in radii], sigma)
    return blurred


def _contrast(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    adjusted: torch.Tensor = F.adjust_contrast(image, (0.6, 0.45, 0.3, 0.2, 0.1)[severity])
    return adjusted


def _brightness(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    adjusted: torch.Tensor = F.adjust_brightness(image, (1.2, 1.4, 1.6, 1.8, 2.1)[severity])
    return adjusted


def _jpeg(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    compressed: torch.Tensor = F.jpeg(image, (40, 25, 15, 10, 5)[severity])
    return compressed


def _pixels(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    height, width = image.shape[1:]
    kept = (0.7, 0.55, 0.4, 0.3, 0.2)[severity]
    small = F.resize(image, [max(1, round(kept * height)), max(1, round(kept * width))], F.InterpolationMode.BILINEAR)
    large: torch.Tensor = F.resize(small, [height, width], F.InterpolationMode.NEAREST)
    return large


CORRUPTIONS: dict[str, _Corruption] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixels": _pixels,
}


def corrupt(image: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """Return a corrupted copy of an image (3, H, W) uint8; equal seeds give equal noise.

    Raises:
        ConfigError: there is no such corruption, or the severity is not 1 to 5.
    """
    check(name in CORRUPTIONS, "eval.sets[].corruptions", name, f"expected some of {list(CORRUPTIONS)}")
    check(severity in SEVERITIES, "severity", severity, "expected 1 to 5")
    return CORRUPTIONS[name](image, severity - 1, torch.Generator().manual_seed(seed))
