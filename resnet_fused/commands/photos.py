"""Real photographs as input of ImageNet networks."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.commands.console import CommandError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def from_folder(folder: Path, batch: int, size: int) -> tuple[Tensor, str]:
    """The first `batch` images of a folder, repeated if there are fewer, and what they are.

    (batch, 3, size, size), normalised as for ImageNet. Raises CommandError.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CommandError(f"--images needs Pillow: {error} (pip install pillow)") from error
    if not folder.is_dir():
        raise CommandError(f"--images must be a folder, got {str(folder)!r}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:batch]
    if not paths:
        raise CommandError(
            f"--images: no images in {str(folder)!r} (looked for {', '.join(sorted(SUFFIXES))})"
        )
    photos = []
    for path in paths:
        try:
            with Image.open(path) as image:
                photos.append(_tensor(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
            raise CommandError(f"--images: cannot read {str(path)!r}: {error}") from error
    crops = [_centre_crop(photo, size) for photo in photos]
    crops = [crops[i % len(crops)] for i in range(batch)]
    return _normalised(torch.stack(crops)), f"{len(paths)} images from {folder}"


def samples(batch: int, size: int) -> tuple[Tensor, str]:
    """Crops of scikit-learn's two sample photographs, or noise where they cannot be read."""
    try:
        from sklearn.datasets import load_sample_images

        photos = [torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images]
    except (ImportError, OSError) as error:
        noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise, f"noise (no sample photographs: {error})"
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(batch):
        photo = photos[i % len(photos)]
        shorter = min(photo.shape[1:])
        side = int(torch.randint(shorter // 2, shorter + 1, (1,), generator=generator))
        top, left = (
            int(torch.randint(0, extent - side + 1, (1,), generator=generator))
            for extent in photo.shape[1:]
        )
        crops.append(_resized(photo[:, top : top + side, left : left + side], size))
    return _normalised(torch.stack(crops)), "crops of scikit-learn's two sample photographs"


def _tensor(image: "Image.Image") -> Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def _centre_crop(photo: Tensor, size: int) -> Tensor:
    side = min(photo.shape[1:])
    top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
    return _resized(photo[:, top : top + side, left : left + side], size)


def _resized(photo: Tensor, size: int) -> Tensor:
    image = photo[None].float() / 255
    shape = (size, size)
    return F.interpolate(image, shape, mode="bilinear", align_corners=False, antialias=True)[0]


def _normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (images - mean) / std
