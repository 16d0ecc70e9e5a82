"""Images and labels: scikit-learn's digits, CIFAR-10 from a folder, or folders of your own images.

Nothing is downloaded. All batches are (images, labels): images (B, 3, size, size), float32,
normalised; labels (B,), int64.
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from reporting import UsageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3760,) * 3
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_VAL_FILES = ("test_batch",)
DIGITS_VAL_IMAGES = 360


@dataclass(frozen=True)
class TensorImages:
    """A split in memory. images: (N, 3, H, W), uint8 or float32 in [0, 1]; labels: (N,)."""

    images: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    size: int
    augment: bool = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set in two splits, each TensorImages or a Dataset that a DataLoader can read."""

    name: str
    classes: int
    train: Any
    val: Any


class Share(NamedTuple):
    """Which part of the images this process sees: number `rank` of `world_size` processes."""

    rank: int = 0
    world_size: int = 1


class TensorBatches:
    """Batches cut out of tensors in memory, augmented a batch at a time: no workers needed."""

    def __init__(self, split: TensorImages, batch_size: int, sampler: Any, drop_last: bool) -> None:
        self.split = split
        self.batch_size = batch_size
        self.sampler = sampler
        self.drop_last = drop_last

    def __len__(self) -> int:
        extra = 0 if self.drop_last else self.batch_size - 1
        return (len(self.sampler) + extra) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.tensor(list(self.sampler), dtype=torch.int64)
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield self._prepared(self.split.images[chosen]), self.split.labels[chosen]

    def _prepared(self, images: Tensor) -> Tensor:
        if self.split.augment:
            images = random_crop_and_flip(images)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if images.shape[2] != self.split.size:
            size = (self.split.size, self.split.size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.split.mean, self.split.std))
        return (images - mean) / std


def load(root: Path | None, size: int | None = None, limit: int | None = None) -> Data:
    """The data set that `root` holds, digits if it is None.

    size: height and width of the images, by default 16 for digits, 32 for CIFAR-10 and 224 for
    folders. limit: so many images of each split, always the same ones. Raises UsageError on a
    folder that is neither CIFAR-10's nor has train/ and val/, or is damaged.
    """
    try:
        data = _digits(size or 16) if root is None else _from_folder(root, size)
    except PermissionError as error:
        raise UsageError(f"cannot read {error.filename!r}: {error.strerror}") from error
    if limit is not None:
        data = replace(data, train=_some(data.train, limit), val=_some(data.val, limit))
    return data


def train_batches(split: Any, batch_size: int, share: Share, seed: int, **loader: Any) -> Any:
    """Shuffled batches of this process's share; `.sampler.set_epoch` gives each epoch its order.

    An incomplete last batch is left out. loader: options of a DataLoader, where one is used.
    Raises UsageError where no batch is left.
    """
    sampler: Any = DistributedSampler(
        split, share.world_size, share.rank, seed=seed, drop_last=True
    )
    if len(sampler) < batch_size:
        raise UsageError(
            f"--batch-size must be at most {len(sampler)}, the number of training images per "
            f"process, got {batch_size}"
        )
    if isinstance(split, TensorImages):
        return TensorBatches(split, batch_size, sampler, drop_last=True)
    return DataLoader(split, batch_size, sampler=sampler, drop_last=True, **loader)


def val_batches(split: Any, batch_size: int, share: Share, **loader: Any) -> Any:
    """A share of the images, in their order; each image is in exactly one process's share."""
    order = range(share.rank, len(split), share.world_size)
    if isinstance(split, TensorImages):
        return TensorBatches(split, batch_size, order, drop_last=False)
    return DataLoader(split, batch_size, sampler=order, **loader)


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by up to `padding` pixels with black around it, and mirrored or not."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    # One gather for the whole batch; it puts the channels last.
    number = torch.arange(n)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _some(split: Any, limit: int) -> Any:
    # Not the first ones: those of a folder are all of one class.
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:limit]
    if isinstance(split, TensorImages):
        return replace(split, images=split.images[chosen], labels=split.labels[chosen])
    return Subset(split, chosen.tolist())


def _from_folder(root: Path, size: int | None) -> Data:
    if not root.is_dir():
        raise UsageError(f"--root must be a folder, got {str(root)!r}")
    for folder in (root / CIFAR_FOLDER, root):
        if (folder / CIFAR_VAL_FILES[0]).is_file():
            return _cifar10(folder, size or 32)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _image_folders(root, size or 224)
    raise UsageError(
        f"--root must hold {CIFAR_FOLDER}/ with CIFAR-10, or train/ and val/ with a folder of "
        f"images per class, got {str(root)!r}"
    )


def _digits(size: int) -> Data:
    """1797 scanned digits of 8x8 pixels, split once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"the digits need scikit-learn: {error} (pip install scikit-learn, or pass --root)"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = (
        TensorImages(images[chosen], labels[chosen], DIGITS_MEAN, DIGITS_STD, size)
        for chosen in (order[DIGITS_VAL_IMAGES:], order[:DIGITS_VAL_IMAGES])
    )
    return Data("digits", 10, train, val)


def _cifar10(folder: Path, size: int) -> Data:
    train, val = (
        TensorImages(*_cifar_files(folder, names), CIFAR_MEAN, CIFAR_STD, size, augment)
        for names, augment in ((CIFAR_TRAIN_FILES, True), (CIFAR_VAL_FILES, False))
    )
    return Data("cifar10", 10, train, val)


def _cifar_files(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(_cifar_file(folder / name) for name in names), strict=True)
    return torch.cat(images), torch.cat(labels)


def _cifar_file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _ArraysUnpickler(file, encoding="bytes").load()
        images = torch.from_numpy(content[b"data"].reshape(-1, 3, 32, 32))
        labels = torch.tensor(content[b"labels"], dtype=torch.int64)
        if images.dtype != torch.uint8 or len(images) != len(labels):
            raise ValueError(f"{len(images)} images in {images.dtype}, {len(labels)} labels")
    except FileNotFoundError as error:
        raise UsageError(f"CIFAR-10 lacks the file {str(path)!r}") from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{str(path)!r} is no batch of CIFAR-10: {reason}") from error
    return images, labels


class _ArraysUnpickler(pickle.Unpickler):
    """Reads pickles of numbers, strings and numpy's arrays, and runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _image_folders(root: Path, size: int) -> Data:
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        raise UsageError(
            f"image folders need torchvision, which cannot be imported: {error} "
            f"(install the version that belongs to torch {torch.__version__})"
        ) from error
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    transforms = {
        "train": [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_tensor],
        "val": [v2.Resize(size * 8 // 7), v2.CenterCrop(size), *to_tensor],
    }
    try:
        train, val = (
            ImageFolder(root / split, v2.Compose(steps), loader=_read_image)
            for split, steps in transforms.items()
        )
    except FileNotFoundError as error:
        raise UsageError(f"--root {str(root)!r}: {str(error).splitlines()[0]}") from error
    if train.classes != val.classes:
        difference = sorted(set(train.classes) ^ set(val.classes))
        raise UsageError(
            f"--root {str(root)!r}: train/ and val/ must have the same classes, but only one of "
            f"them has {', '.join(difference)}"
        )
    return Data("folder", len(train.classes), train, val)


def _read_image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UsageError(f"cannot read the image {path!r}: {error}") from error
