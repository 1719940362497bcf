"""``--data images/``: a folder of images as batches, read as the model's own evaluation reads them."""

from __future__ import annotations

import importlib
import math
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bnfix.errors import LoadError, MissingDependencyError, one_line
from bnfix.formats.specs import InputHint

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_OWN = "--data loader.py:make"
_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class ImageTransform:
    """The evaluation transform of an image classifier, as in torchvision's presets and timm's ``create_transform``.

    The image is resized until its sides cover ``resize`` (height, width), or with ``squash`` to just that; the centre
    of ``size`` is cut out, brought to 0..1 and normalised by ``mean`` and ``std``, three numbers each, or one: then
    the image is read as grey. ``source`` says who states these values.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    source: str = "assumed"
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} are no values of one or three channels")
        if min(self.size) < 1 or any(r < s for r, s in zip(self.resize, self.size, strict=True)):
            raise ValueError(f"no centre of {self.size} can be cut out of {self.resize}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {', '.join(_FILTERS)}")

    @property
    def mode(self) -> str:
        """Pillow's mode of the image: RGB or L."""
        return "RGB" if len(self.mean) == 3 else "L"

    def __call__(self, image: Any) -> Tensor:
        """A Pillow image of this mode as a float32 tensor (C, height, width)."""
        filters = _pillow("PIL.Image").Resampling
        image = image.resize(self._scaled(*image.size), filters[self.interpolation.upper()])
        # round() to even, as torchvision: the same pixels
        top, left = round((image.height - self.size[0]) / 2), round((image.width - self.size[1]) / 2)
        image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(*self.size, -1)).permute(2, 0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels.contiguous().float() / 255).sub_(mean).div_(std)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing; rounded as torchvision does for squares, as timm does for others."""
        if self.squash:
            return self.resize[1], self.resize[0]
        if self.resize[0] == self.resize[1]:
            short, long = sorted((width, height))
            longer = int(self.resize[0] * long / short)
            return (self.resize[0], longer) if width <= height else (longer, self.resize[0])
        ratio = min(height / self.resize[0], width / self.resize[1])
        return round(width / ratio), round(height / ratio)

    def describe(self) -> str:
        """What is done to an image, and who says so: ``shorter side 256, centre 224, …``."""
        if self.squash:
            scaled = f"squashed to {_by(self.resize)}"
        elif self.resize[0] == self.resize[1]:
            scaled = f"shorter side {self.resize[0]}"
        else:
            scaled = f"scaled to cover {_by(self.resize)}"
        imagenet = (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD)
        values = "ImageNet mean and std" if imagenet else f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"
        grey = "" if self.mode == "RGB" else "grey, "
        return (
            f"{scaled}, centre {_by(self.size)}, {self.interpolation}, {grey}{values} "
            f"({self.source}; another transform: {_OWN})"
        )


def image_transform(model: nn.Module, *, arch: str | None = None, hint: InputHint | None = None) -> ImageTransform:
    """The transform that ``model`` is evaluated with, as far as anybody states it.

    For ``arch`` ``torchvision:name`` that of its default weights, else what timm left on the model
    (``pretrained_cfg``). Otherwise ImageNet's values are assumed, at the size of ``hint`` (one sample without the
    batch, and who says so) or 224, and ``source`` says that. A model whose first convolution takes one channel gets
    grey images, normalised by the averages over the colours.

    Raises:
        LoadError: timm states a way of cropping that is not read here.
    """
    found = _of_torchvision(arch) or _of_timm(model)
    if found is None:
        shape = hint[0] if hint is not None and len(hint[0]) == 3 else (3, 224, 224)
        height, width = int(shape[-2]), int(shape[-1])
        found = ImageTransform((height, width), (round(height / 0.875), round(width / 0.875)))
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if first != 1 or found.mode == "L":
        return found
    mean, std = (round(sum(v) / len(v), 6) for v in (found.mean, found.std))
    source = found.source if found.source == "assumed" else f"averages of {found.source}"
    return ImageTransform(found.size, found.resize, (mean,), (std,), found.interpolation, source, found.squash)


def _of_torchvision(arch: str | None) -> ImageTransform | None:
    hub, _, name = (arch or "").partition(":")
    if hub != "torchvision":
        return None
    models = importlib.import_module("torchvision.models")
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    preset: Any = weights.transforms() if weights is not None else None
    crop, resize = (getattr(preset, f"{what}_size", None) for what in ("crop", "resize"))
    if not (isinstance(crop, list) and isinstance(resize, list) and len(crop) == len(resize) == 1):
        return None  # of detectors, segmentation and video: not for single images of one size
    return ImageTransform(
        (crop[0], crop[0]),
        (resize[0], resize[0]),
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
        f"torchvision's {weights}",
    )


def _of_timm(model: nn.Module) -> ImageTransform | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or len(config.get("input_size") or ()) != 3:
        return None
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash"):
        raise LoadError(
            f"timm's default_cfg crops in the mode {crop_mode!r}, which bnfix does not",
            hint=f"your own loader:  {_OWN}",
        )
    height, width = config["input_size"][1:]
    share = config.get("crop_pct") or 0.875
    return ImageTransform(
        (height, width),
        (math.floor(height / share), math.floor(width / share)),
        tuple(config.get("mean") or IMAGENET_MEAN),
        tuple(config.get("std") or IMAGENET_STD),
        config.get("interpolation") or "bicubic",
        "timm's default_cfg",
        crop_mode == "squash",
    )


# ---------------------------------------------------------------------------------------- files


class Images(Dataset[Tensor]):
    """The images at ``paths``, each read when it is asked for."""

    def __init__(self, paths: list[str], transform: ImageTransform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """One image, (C, height, width).

        Raises:
            LoadError: the file is no image, or damaged; names it.
        """
        return self.transform(read_image(self.paths[index], self.transform.mode))


class ImageLoader(DataLoader[Tensor]):
    """Batches of images; iterating reads them, again each time, in the same order."""

    def __init__(self, images: Images, batch_size: int, seed: int) -> None:
        # A generator of its own: each pass of a DataLoader draws from one, and the global state is the user's
        super().__init__(images, batch_size=batch_size, generator=torch.Generator().manual_seed(seed))
        self.images = images
        self.seed = seed

    def describe(self) -> str:
        """The line for the reader: how many images, in which order, read how."""
        shown = f"{len(self.images):,} image{'' if len(self.images) == 1 else 's'}"
        return f"{shown}, shuffled with seed {self.seed}: {self.images.transform.describe()}"


def load_images(folder: Path, *, batch_size: int, seed: int, transform: ImageTransform | None = None) -> ImageLoader:
    """The images in ``folder`` and the folders below it, in batches.

    The order is drawn with ``seed`` from the sorted paths: folders hold one class each, or one film, and the first
    images in order of their names would be no sample of the data.

    Raises:
        LoadError: there are none.
        MissingDependencyError: Pillow is not installed (the extra ``images``).
    """
    _pillow("PIL.Image")
    paths = sorted(_files(folder), key=lambda path: path.relative_to(folder).as_posix())
    found = [os.fspath(path) for path in paths if path.suffix.lower() in SUFFIXES]
    if not found:
        raise LoadError(
            f"{folder} holds no images{_others(paths)}; bnfix reads {', '.join(s[1:] for s in SUFFIXES)}",
            hint=f"a function that returns your loader:  {_OWN}",
        )
    random.Random(seed).shuffle(found)
    if transform is None:
        transform = ImageTransform((224, 224), (256, 256))
    return ImageLoader(Images(found, transform), batch_size, seed)


def read_image(path: str, mode: str) -> Any:
    """A Pillow image in ``mode`` (RGB or L), turned as its EXIF orientation says; of an animation the first frame.

    Transparency is dropped, as torchvision's loader does. 16-bit grey is brought to 8 bits.

    Raises:
        LoadError: it is no image, damaged, or holds values whose range nobody states.
    """
    pillow, operations = _pillow("PIL.Image"), _pillow("PIL.ImageOps")
    try:
        with pillow.open(path) as file:
            return _eight_bits(pillow, operations.exif_transpose(file), path).convert(mode)
    except LoadError:
        raise
    except Exception as error:  # damaged files fail in Pillow's many decoders, each with errors of its own
        raise LoadError(
            f"{path} can't be read as an image: {one_line(error, 160)}", hint="mend it, or take it out of the folder"
        ) from error


def _eight_bits(pillow: Any, image: Any, path: str) -> Any:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise LoadError(
            f"{path} holds values from {values.min():g} to {values.max():g}: their range is not known",
            hint=f"a function that returns your loader:  {_OWN}",
        )
    return pillow.fromarray((values >> 8).astype(np.uint8))


def _files(folder: Path) -> Iterator[Path]:
    """Every file below ``folder`` but hidden ones; a folder that links lead to twice is read once."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _others(paths: list[Path]) -> str:
    kinds = sorted({path.suffix.lower() for path in paths} - {""})
    return f", but {len(paths):,} other files ({', '.join(kinds[:4])})" if kinds else ""


def _pillow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError("pillow", "images", "a folder of images") from error


def _by(sides: tuple[int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:g}" for v in values)
