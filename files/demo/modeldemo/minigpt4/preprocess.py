"""Turns a picture into the normalised pixels that EVA was trained on."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

# CLIP's statistics of RGB in 0…1, as in upstream's blip processors.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def resize(image: Image.Image, size: int) -> Tensor:
    """Any picture → [3, size, size] uint8; bicubic and without a crop, as upstream's eval."""
    small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    flat = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return flat.reshape(size, size, 3).permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """[…, 3, H, W] uint8 → float32 with the mean and deviation above."""
    mean = torch.tensor(MEAN, device=pixels.device).reshape(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).reshape(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def preprocess(image: Image.Image, size: int) -> Tensor:
    """Any picture → [1, 3, size, size] normalised float32."""
    return normalize(resize(image, size)).unsqueeze(0)
