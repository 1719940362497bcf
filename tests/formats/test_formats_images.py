"""A folder of images as batches: the transform of the model's own evaluation, and every image once."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnfix.errors import LoadError, MissingDependencyError
from bnfix.formats import ImageTransform, image_transform, load_data
from bnfix.formats.images import IMAGENET_MEAN, IMAGENET_STD, ImageLoader, Images, read_image

Image = pytest.importorskip("PIL.Image")

SIZES = [(300, 200), (200, 301), (57, 91), (224, 224), (256, 256), (640, 233), (1000, 37)]
"""Width and height: wide, high, smaller than the crop, just its size, just the resized one, odd, extreme."""


def picture(width: int, height: int, seed: int = 0) -> Any:
    """Smooth colours with some noise: what resizes and crops in another way differs at once."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    return Image.fromarray(np.clip(base + rng.integers(-40, 40, base.shape), 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images, one colour each, which no transform changes."""
    for k, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (40, 30), (100 * k, 20 * i, 7)).save(tmp_path / name / f"{i}.png")
    return tmp_path


PLAIN = ImageTransform((8, 8), (9, 9), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Colours as they are, in 0..1."""


def colours(batches: Any) -> list[tuple[int, int, int]]:
    pixels = (torch.cat(list(batches))[:, :, 4, 4] * 255).round().int().tolist()
    return [tuple(p) for p in pixels]


# ---------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "inception_v3", "efficientnet_b0", "swin_t", "regnet_y_400mf"]
)
def test_torchvision_preset_to_the_bit(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    transform = image_transform(nn.Identity(), arch=f"torchvision:{name}")
    assert str(weights) in transform.describe()
    for size in SIZES:
        image = picture(*size)
        assert torch.equal(transform(image), weights.transforms()(image)), size


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),  # 0.95 of 224: a shorter side of 235
        ("mobilenetv2_100", {}),
        ("tf_efficientnet_b3", {}),
        ("inception_v3", {}),  # mean and std of 0.5, in one weight or another
        ("resnet18", {"crop_mode": "squash", "crop_pct": 0.9}),
        ("resnet18", {"input_size": (3, 256, 128), "crop_pct": 0.875}),  # for people, not for squares
        ("resnet18", {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}),
    ],
)
def test_timm_evaluation_transform_to_the_bit(name: str, kwargs: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    model.pretrained_cfg = model.pretrained_cfg | kwargs
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    transform = image_transform(model, arch=f"timm:{name}")
    assert transform.source == "timm's default_cfg"
    for size in SIZES:
        image = picture(*size)
        assert torch.equal(transform(image), theirs(image)), size


def test_way_of_cropping_that_is_not_read_is_an_error() -> None:
    model = nn.Conv2d(3, 2, 1)
    model.pretrained_cfg = {"input_size": (3, 224, 224), "crop_mode": "border"}  # type: ignore[assignment]
    with pytest.raises(LoadError, match="'border'") as caught:
        image_transform(model)
    assert "loader.py:make" in (caught.value.hint or "")


def test_without_anybody_who_states_it_imagenet_is_assumed_and_said() -> None:
    transform = image_transform(nn.Conv2d(3, 4, 3))
    assert transform.describe() == (
        "shorter side 256, centre 224, bilinear, ImageNet mean and std "
        "(assumed; another transform: --data loader.py:make)"
    )
    hinted = image_transform(nn.Conv2d(3, 4, 3), hint=((3, 96, 64), "somebody"))
    assert (hinted.size, hinted.resize) == ((96, 64), (110, 73))
    assert hinted.describe().startswith("scaled to cover 110x73, centre 96x64, ")
    detector = image_transform(nn.Identity(), arch="torchvision:fasterrcnn_resnet50_fpn")
    assert detector.source == "assumed"  # its preset neither resizes nor normalises


def test_model_of_one_channel_gets_grey_images_by_the_averages() -> None:
    transform = image_transform(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)))
    assert (transform.mode, transform.mean, transform.std) == ("L", (0.449,), (0.226,))
    assert ", grey, mean 0.449, std 0.226 (assumed;" in transform.describe()
    image = picture(256, 256).convert("L")
    expected = (np.asarray(image)[16:240, 16:240] / 255 - 0.449) / 0.226
    # float32 against float64: three roundings of 6e-8 of values below 3
    assert np.abs(transform(image)[0].numpy() - expected).max() < 1e-6
    timm = pytest.importorskip("timm")
    grey = image_transform(timm.create_model("resnet18", in_chans=1))
    assert (grey.mode, grey.source) == ("L", "averages of timm's default_cfg")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 8)},
        {"size": (10, 8)},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5,)},
        {"std": (1.0, 1.0, 0.0)},
        {"interpolation": "random"},
    ],
)
def test_transform_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mean|centre|interpolation"):
        ImageTransform(**{"size": (8, 8), "resize": (9, 9), **wrong})


# ---------------------------------------------------------------------------------------- folder


def test_every_image_once_in_batches_that_are_read_again_each_time(folder: Path) -> None:
    data = load_data(folder, batch_size=5, transform=PLAIN)
    assert len(data) == 3  # type: ignore[arg-type]
    assert [len(b) for b in data] == [5, 5, 2]
    expected = Counter((100 * k, 20 * i, 7) for k in range(2) for i in range(6))
    assert Counter(colours(data)) == expected
    assert colours(data) == colours(data)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(folder / "cats" / "0.png")
    assert (1, 2, 3) in colours(data)  # read when asked for, not before


def test_order_is_drawn_by_the_seed_so_that_the_first_images_are_no_single_class(folder: Path) -> None:
    orders = {seed: colours(load_data(folder, seed=seed, transform=PLAIN)) for seed in range(8)}
    assert orders[3] == colours(load_data(folder, seed=3, transform=PLAIN))
    assert len({tuple(o) for o in orders.values()}) == 8
    # both classes among the first six: all of one class has the probability 2/924 for a seed
    assert all(len({c[0] for c in order[:6]}) == 2 for order in orders.values())
    line = load_data(folder, seed=3, transform=PLAIN).describe()  # type: ignore[attr-defined]
    assert line.startswith("12 images, shuffled with seed 3: shorter side 9, centre 8")


def test_passes_leave_the_random_state_of_the_user_alone(folder: Path) -> None:
    states = torch.get_rng_state(), random.getstate()
    list(load_data(folder, transform=PLAIN))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_line_for_the_reader(tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    line = load_data(tmp_path).describe()  # type: ignore[attr-defined]
    assert line.startswith("1 image, shuffled with seed 0: shorter side 256, centre 224, bilinear, ImageNet mean and")
    many = Images(["a.png"] * 1024, PLAIN)
    assert ImageLoader(many, 8, 0).describe().startswith("1,024 images, ")


def test_formats_modes_and_places(tmp_path: Path) -> None:
    colour = (200, 100, 50)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    source = Image.new("RGB", (20, 20), colour)
    for name in ("x.png", "x.JPG", "x.jpeg", "x.bmp", "x.webp", "x.tif", "x.TIFF"):
        source.save(deep / name, **({"quality": 100} if name[2:4].lower() in ("jp", "we") else {}))
    frames = [source, Image.new("RGB", (20, 20), (0, 0, 0))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    source.convert("RGBA").save(tmp_path / "alpha.png")
    source.quantize(4).save(tmp_path / "palette.png")
    source.save(tmp_path / ".hidden.png")
    (tmp_path / ".thumbs").mkdir()
    source.save(tmp_path / ".thumbs" / "x.png")
    (tmp_path / "._x.jpg").write_bytes(b"\0\5\26\7")  # what macOS leaves beside each file in archives
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / "again").symlink_to(deep, target_is_directory=True)
    (deep / "up").symlink_to(tmp_path, target_is_directory=True)
    found = colours(load_data(tmp_path, transform=PLAIN))
    assert len(found) == 10
    for c in found:  # JPEG and WebP store rounded luma and chroma
        assert max(abs(a - b) for a, b in zip(c, colour, strict=True)) <= 3


def test_grey_images_for_models_of_three_channels_and_colours_for_those_of_one(tmp_path: Path) -> None:
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    assert colours(load_data(tmp_path, transform=PLAIN)) == [(90, 90, 90)]
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "grey.png")
    (batch,) = load_data(tmp_path, transform=ImageTransform((8, 8), (8, 8), (0.0,), (1.0,)))
    assert batch.shape == (1, 1, 8, 8)
    assert (batch * 255).round().unique().tolist() == [76]  # .299 of 255: luma as in ITU-R 601-2, Pillow's


def test_orientation_that_cameras_store_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90° clockwise to be seen: white on top
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = read_image(str(tmp_path / "x.jpg"), "RGB")
    assert image.size == (16, 32)
    assert np.asarray(image)[:14].min() > 240
    assert np.asarray(image)[18:].max() < 15


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "deep.png"), "L")), values >> 8)
    Image.fromarray(values.astype(np.float32) / 7).save(tmp_path / "float.tif")
    with pytest.raises(LoadError, match=r"float\.tif holds values from 0 to 9362\.14: their range is not known"):
        read_image(str(tmp_path / "float.tif"), "L")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "head"])
def test_damaged_image_is_named_and_not_passed_over(folder: Path, damage: str) -> None:
    picture(300, 200).save(folder / "dogs" / "bad.jpg")
    whole = (folder / "dogs" / "bad.jpg").read_bytes()
    content = {"cut": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b"", "head": whole[:30]}[damage]
    (folder / "dogs" / "bad.jpg").write_bytes(content)
    with pytest.raises(LoadError, match=r"dogs.bad\.jpg can't be read as an image: \w+") as caught:
        list(load_data(folder))
    assert "\n" not in caught.value.message
    assert "take it out of the folder" in (caught.value.hint or "")


def test_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no images; bnfix reads jpg, jpeg, png") as caught:
        load_data(tmp_path)
    assert "loader.py:make" in (caught.value.hint or "")
    (tmp_path / "x.heic").write_bytes(b"")
    (tmp_path / "y.npy").write_bytes(b"")
    with pytest.raises(LoadError, match=r"holds no images, but 2 other files \(\.heic, \.npy\)"):
        load_data(tmp_path)


def test_one_image_is_no_data(folder: Path) -> None:
    with pytest.raises(LoadError, match="is one image") as caught:
        load_data(folder / "cats" / "0.png")
    assert str(folder / "cats") in (caught.value.hint or "")


def test_without_pillow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match="a folder of images needs pillow") as caught:
        load_data(folder)
    assert caught.value.hint == "pip install 'bnfix[images]'"


def test_arrays_need_no_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, name, None)
    np.save(tmp_path / "x.npy", np.ones((4, 2), np.float32))
    assert len(load_data(tmp_path / "x.npy", batch_size=2)) == 2  # type: ignore[arg-type]


def test_values_reach_a_model_as_they_were_meant(folder: Path) -> None:
    found: Tensor = torch.cat(list(load_data(folder)))
    assert found.shape == (12, 3, 224, 224)
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    back = (found * std + mean) * 255
    assert (back - back.round()).abs().max() < 1e-3  # 8 bits: whole numbers, but for rounding in float32
    assert Counter(back[:, 0, 0, 0].round().int().tolist()) == {0: 6, 100: 6}
