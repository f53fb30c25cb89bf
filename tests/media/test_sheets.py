import errno
import io
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from fastlatent.media import sheets
from fastlatent.media.sheets import save_loss_curve, save_png, save_sheet


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def load(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image)


@pytest.mark.parametrize(("shape", "mode"), [((5, 4, 3), "RGB"), ((5, 4, 1), "L"), ((1, 1, 3), "RGB")])
def test_png_keeps_every_pixel(tmp_path, shape, mode):
    image = noise(*shape)
    save_png(tmp_path / "one.png", image)
    with Image.open(tmp_path / "one.png") as written:
        assert written.mode == mode
        np.testing.assert_array_equal(np.array(written).reshape(shape), image)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_png_refuses_other_arrays(tmp_path, image):
    with pytest.raises(ValueError, match=r"save_png: expected uint8 \[H, W, 1 or 3\]"):
        save_png(tmp_path / "one.png", image)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_layout(tmp_path, channels):
    images = noise(5, 3, 4, channels)
    save_sheet(tmp_path / "s.png", images, columns=3, scale=2)
    sheet = load(tmp_path / "s.png")
    sheet = sheet.reshape(*sheet.shape[:2], channels)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2 * 2, channels)  # 2 rows, 3 columns, separators of 2
    covered = np.zeros(sheet.shape, bool)
    for i, image in enumerate(images):
        y, x = i // 3 * 8, i % 3 * 10
        np.testing.assert_array_equal(sheet[y : y + 6 : 2, x : x + 8 : 2], image)
        np.testing.assert_array_equal(sheet[y + 1 : y + 6 : 2, x + 1 : x + 8 : 2], image)  # nearest neighbour
        covered[y : y + 6, x : x + 8] = True
    assert (sheet[~covered] == 255).all()  # separators and the sixth, empty cell


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (64, 64, 1),  # exactly large enough
        (63, 64, 2),  # the shorter side decides
        (1, 1, 64),
        (28, 28, 3),  # 84: 2 would give 56
        (256, 300, 1),  # never shrunk
    ],
)
def test_scale_makes_small_images_visible(tmp_path, height, width, scale):
    save_sheet(tmp_path / "s.png", noise(1, height, width, 3), columns=8)  # fewer images than columns
    assert load(tmp_path / "s.png").shape == (height * scale, width * scale, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("font", [ImageFont.load_default, ImageFont.load_default_imagefont])
def test_sheet_labels(tmp_path, monkeypatch, channels, font):
    monkeypatch.setattr(ImageFont, "load_default", font)  # the second is what Pillow has without FreeType
    images = np.zeros((3, 64, 64, channels), dtype=np.uint8)
    labels = ["7", "", "wörd 图\udcff\n" * 50]  # not ASCII, no text at all, a line break, far too long
    save_sheet(tmp_path / "s.png", images, columns=3, labels=labels)
    sheet = load(tmp_path / "s.png")
    assert sheet.shape[:2] == (64 + sheets.LABEL_HEIGHT, 3 * 64 + 2 * 2)
    under = sheet[64:]
    dark = [bool((under[:, x : x + 64] < 128).any()) for x in (0, 66, 132)]
    assert dark == [True, False, True]
    for x in (64, 130):
        assert (under[:, x : x + 2] == 255).all()  # no text runs into a neighbour
    assert (sheet[:64, :64] == 0).all()


def test_sheet_refuses_bad_arguments(tmp_path):
    images = noise(2, 4, 4, 3)
    with pytest.raises(ValueError, match="columns and scale of at least 1, got 0 and None"):
        save_sheet(tmp_path / "s.png", images, columns=0)
    with pytest.raises(ValueError, match="columns and scale of at least 1, got 1 and 0"):
        save_sheet(tmp_path / "s.png", images, columns=1, scale=0)
    with pytest.raises(ValueError, match="expected 2 labels, one per image, got 1"):
        save_sheet(tmp_path / "s.png", images, columns=1, labels=["a"])
    for bad in (images[:0], images[0], images.astype(np.float32), noise(2, 4, 4, 2)):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 1 or 3\]"):
            save_sheet(tmp_path / "s.png", bad, columns=1)
    assert os.listdir(tmp_path) == []


def curve_axes(monkeypatch, tmp_path, steps, series, title="loss"):
    """The axes of the figure that save_loss_curve draws."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def spy(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    save_loss_curve(tmp_path / "loss.png", steps, series, title)
    assert load(tmp_path / "loss.png").shape[2] in (3, 4)
    (figure,) = figures
    (axes,) = figure.axes
    return axes


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3.0, 2.0, 1.0], "log"),
        ([3.0, 0.0, 1.0], "linear"),  # log of 0
        ([3.0, -2.0, 1.0], "linear"),
        ([3.0, float("nan"), float("inf")], "log"),  # a diverged run still has a curve
        ([float("nan")] * 3, "log"),  # the other series is positive
    ],
)
def test_loss_axis(monkeypatch, tmp_path, values, scale):
    axes = curve_axes(monkeypatch, tmp_path, [0, 10, 20], {"train": values, "ema": [1.0, 1.0, 1.0]}, "run")
    assert axes.get_yscale() == scale
    assert [line.get_label() for line in axes.lines] == ["train", "ema"]
    assert axes.lines[0].get_xdata().tolist() == [0, 10, 20]
    assert axes.get_title() == "run" and axes.get_xlabel() == "step"


def test_loss_curve_of_nan_alone_and_of_one_step(monkeypatch, tmp_path):
    assert curve_axes(monkeypatch, tmp_path, [0], {"a": [float("nan")]}).get_yscale() == "linear"
    monkeypatch.undo()
    axes = curve_axes(monkeypatch, tmp_path, [5], {"a": [2.0]})
    assert axes.lines[0].get_marker() == "."  # a line of one point would be invisible


def test_dollars_are_no_formula(monkeypatch, tmp_path):
    # As mathtext, an unclosed brace raises.
    axes = curve_axes(monkeypatch, tmp_path, [0, 1], {"$\\frac{$": [1.0, 2.0]}, title="cost $\\frac{$")
    assert axes.get_title() == "cost $\\frac{$"


def test_loss_curve_refuses_bad_series(tmp_path):
    with pytest.raises(ValueError, match="'a' has 1 values for 2 steps"):
        save_loss_curve(tmp_path / "l.png", [0, 1], {"a": [1.0]}, "t")
    for steps, series in (([], {"a": []}), ([1], {})):
        with pytest.raises(ValueError, match="expected steps and series"):
            save_loss_curve(tmp_path / "l.png", steps, series, "t")
    assert os.listdir(tmp_path) == []


def test_loss_curve_leaves_pyplot_alone(tmp_path):
    save_loss_curve(tmp_path / "l.png", [0, 1], {"a": [1.0, 2.0]}, "t")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("fault", ["open", "write", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, fault):
    target = tmp_path / "one.png"
    save_png(target, noise(5, 4, 3))
    before = target.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif fault == "open":
        monkeypatch.setattr(sheets, "open", fail, raising=False)
    else:

        class FullDisk(io.FileIO):
            def write(self, data):
                super().write(data[:10])  # the part that fitted
                fail()

        monkeypatch.setattr(sheets, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        save_png(target, noise(9, 9, 3))
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["one.png"]  # no temporary file stays


def test_the_target_is_a_folder(tmp_path):
    os.makedirs(tmp_path / "one.png" / "inside")
    with pytest.raises(OSError):
        save_png(tmp_path / "one.png", noise(5, 4, 3))
    assert os.listdir(tmp_path) == ["one.png"] and os.listdir(tmp_path / "one.png") == ["inside"]


def test_parents_relative_paths_and_long_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    longest = "a" * 251 + ".png"  # 255 bytes, no room for a suffix
    save_png("here.png", noise(5, 4, 3))
    save_png(os.path.join("new", "folders", longest), noise(5, 4, 3))
    assert sorted(os.listdir(tmp_path)) == ["here.png", "new"]
    assert os.listdir(tmp_path / "new" / "folders") == [longest]


def test_the_file_is_readable_by_others(tmp_path):
    # tempfile's 0600 would survive the rename and lock colleagues out of a shared folder.
    old = os.umask(0o022)
    try:
        save_png(tmp_path / "one.png", noise(5, 4, 3))
    finally:
        os.umask(old)
    assert os.stat(tmp_path / "one.png").st_mode & 0o777 == 0o644
