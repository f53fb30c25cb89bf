"""From a decoded image to the pixels that an autoencoder sees: resizes and crops by recorded rules.

A rule is a plan of whole numbers made from the image's size (and, for random crops, its key); `fastlatent.ops.resize`
then makes the pixels of the crop only, the same bytes on every device. So a resized image may be as large as it likes:
one row of 100,000 pixels enlarged to 256 rows would have 6.5 thousand million.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastlatent.ops.resize import resize

Pixels = TypeVar("Pixels", np.ndarray, Tensor)
DTYPES = (np.dtype(np.uint8), np.dtype(np.float32), torch.uint8, torch.float32)

TRANSFORM_RULE = "adm-center-crop-1"
"""The name, kept in provenance, of what `center_crop` does."""

# torchvision's Resize takes the longer side's integer part, CenterCrop rounds its offset half to even.
SHORT_SIDE_RULE = "bilinear-short-side-{}-crop-1"
NWM_RULE = "nwm-4x3-squash-1"
BUCKETS_RULE = "buckets-cover-bicubic-1"
# The area and aspect ratios that V-JEPA trains with (Bardes et al., 2024); torchvision's areas begin at 0.08.
AREAS, ASPECTS = (0.3, 1.0), (0.75, 1.35)
RANDOM_RESIZED_RULE = "random-resized-crop-area-0.3-1-aspect-0.75-1.35-bilinear-1"
NAMES = ("adm", "center", "random", "random-resized", "nwm", "buckets")


@dataclass(frozen=True)
class Plan:
    """Cut `box` (top, left, height, width) from the source, resize it by each (height, width, filter) of `steps` in
    turn, and keep [height, width] at (top, left) of the last: the `window`."""

    box: tuple[int, int, int, int]
    steps: tuple[tuple[int, int, str], ...]
    window: tuple[int, int, int, int]

    def crop(self) -> np.ndarray:
        """int32 [4]: top, left, height and width of what the window shows, in pixels of the source, each rounded."""
        (first_row, first_column, box_height, box_width), (top, left, height, width) = self.box, self.window
        rows, columns = box_height / self.steps[-1][0], box_width / self.steps[-1][1]
        y, x = min(round(top * rows), box_height - 1), min(round(left * columns), box_width - 1)
        # Two halves that are both rounded up would reach over the edge.
        shown = min(round(height * rows), box_height - y), min(round(width * columns), box_width - x)
        return np.array([first_row + y, first_column + x, max(1, shown[0]), max(1, shown[1])], dtype=np.int32)


@dataclass(frozen=True)
class Transform:
    """One rule at one size. `shapes`: (height, width) of the pixels of each bucket; there is one bucket unless the rule
    is "buckets". `rule` and `settings()` say in provenance what became of the images."""

    name: str
    rule: str
    size: int
    seed: int
    shapes: tuple[tuple[int, int], ...]

    def shape_of(self, height: int, width: int) -> int:
        """The bucket of an upright image: the index into `shapes` with the nearest ratio of height to width."""
        ratio = math.log(height / width)
        return min(range(len(self.shapes)), key=lambda i: abs(math.log(self.shapes[i][0] / self.shapes[i][1]) - ratio))

    def apply(self, image: Pixels, key: str, bucket: int = 0) -> tuple[Pixels, np.ndarray]:
        """The pixels of one image.

        Args:
            image: [H, W, 1 to 4] uint8, or float32 in [0, 1]: an array, or a tensor on any device.
            key: the image's; "random" and "random-resized" draw their crops from (seed, key) alone.
            bucket: of `shape_of`.

        Returns:
            pixels [*shapes[bucket], C], of the image's kind, dtype and device; and the crop (top, left, height, width)
            int32 [4]: the region that they show, in pixels of the image passed in, each rounded to the nearest integer.

        Raises:
            ValueError: shape or dtype is not as above.
        """
        _check_image(f"transform {self.name}", image)
        plan = self.plan(image.shape[0], image.shape[1], key, bucket)
        return run_plan(image, plan), plan.crop()

    def plan(self, height: int, width: int, key: str, bucket: int = 0) -> Plan:
        """What `apply` does to an image of this size."""
        if self.name == "adm":
            return _adm_plan(height, width, self.size)
        if self.name == "center":
            return _center_plan(height, width, self.size)
        if self.name == "random":
            return _random_plan(height, width, self.size, self.seed, key)
        if self.name == "random-resized":
            return _random_resized_plan(height, width, self.size, self.seed, key)
        if self.name == "nwm":
            return _nwm_plan(height, width, self.size)
        return _buckets_plan(height, width, self.shapes[bucket])

    def settings(self) -> dict[str, Any]:
        """What provenance records, and what must not change within a dataset."""
        settings: dict[str, Any] = {"rule": self.rule, "size": self.size}
        if self.name in ("random", "random-resized"):
            settings["seed"] = self.seed
        if self.name == "buckets":
            settings["shapes"] = [list(shape) for shape in self.shapes]
        return settings


def transform_name(settings: dict[str, Any]) -> str:
    """The name of the transform with these `Transform.settings`.

    Raises:
        ValueError: their rule is none of ours.
    """
    rule = settings.get("rule")
    for name in NAMES:
        if rule == _rule(name):
            return name
    raise ValueError(f"transform: expected a rule among {', '.join(map(_rule, NAMES))}, got {rule!r:.100}")


def _rule(name: str) -> str:
    rules = {
        "adm": TRANSFORM_RULE, "random-resized": RANDOM_RESIZED_RULE, "nwm": NWM_RULE, "buckets": BUCKETS_RULE
    }  # fmt: skip
    return rules.get(name) or SHORT_SIDE_RULE.format(name)


def transform_of(settings: dict[str, Any]) -> Transform:
    """The transform with these `Transform.settings`: their inverse.

    Raises:
        ValueError: their rule is none of ours, or what it needs is not there.
    """
    name = transform_name(settings)
    try:
        size, seed = int(settings["size"]), int(settings.get("seed", 0))
        shapes = tuple((int(height), int(width)) for height, width in settings.get("shapes") or [(size, size)])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"transform: expected settings of {settings['rule']}, got {settings!r:.200}") from None
    transform = Transform(name=name, rule=_rule(name), size=size, seed=seed, shapes=shapes)
    if transform.settings() != settings:
        raise ValueError(f"transform: expected settings like {transform.settings()}, got {settings!r:.200}")
    return transform


def open_transform(name: str, size: int, *, seed: int = 0, multiple: int = 8) -> Transform:
    """The transform of a name.

    - "adm": `center_crop`, what DiT, MAR and LatentLM trained with.
    - "center", "random": the shorter side to `size` by the bilinear filter, the longer one to int(size * long / short),
      as torchvision's Resize does with PIL images (antialiased; smaller images are enlarged); then size x size cut from
      the centre as CenterCrop does, or at a place drawn from (seed, key) by XXH3.
    - "random-resized": torchvision's RandomResizedCrop: a box of 0.3 to 1 of the image's area (uniform) and a ratio of
      width to height of 0.75 to 1.35 (uniform in its logarithm), rounded, at a uniform place; the first of ten draws
      that fits, else the largest box in the centre within those ratios; by the bilinear filter to size x size.
    - "nwm": the navigation world models' crop to 4:3 around the centre, then the bilinear filter to size x size, which
      squashes. Landscapes narrower than 4:3 lose rows; the published code pads them with black columns instead.
    - "buckets": the bucket with the nearest ratio of sides; resized to cover it by the bicubic filter in one step, and
      cut from the centre. Buckets are all height x width of at most size^2 pixels, between 1:2 and 2:1, whose sides are
      multiples of the same step (about size / 16, a multiple of `multiple`; 64 at 1024 as SDXL has it) and not inside
      another bucket.

    Args:
        size: pixels of a side, or the square root of a bucket's area.
        seed: of "random" and "random-resized", 0 to 2^64 - 1.
        multiple: what sides must be multiples of: the autoencoder's.

    Raises:
        ValueError: an unknown name, a size that is no positive multiple of `multiple`, or a seed out of range.
    """
    if name not in NAMES:
        raise ValueError(f"open_transform: expected one of {', '.join(NAMES)}, got {name!r}")
    if size < 1 or size % multiple:
        raise ValueError(
            f"--size: expected one that is a multiple of {multiple} pixels, as the autoencoder needs it, "
            f"got {size}; the nearest is {max(1, round(size / multiple)) * multiple}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"open_transform: expected a seed of 0 to 2^64 - 1, got {seed}")
    shapes = bucket_shapes(size, multiple) if name == "buckets" else ((size, size),)
    return Transform(name=name, rule=_rule(name), size=size, seed=seed, shapes=shapes)


def bucket_shapes(size: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket of "buckets", by height; each beside its transpose."""
    step = math.ceil(size / 16 / multiple) * multiple
    shapes = set()
    for side in range(step, 2 * size + 1, step):
        other = size * size // side // step * step
        if other and max(side, other) <= 2 * min(side, other):
            shapes |= {(side, other), (other, side)}
    return tuple(
        sorted(
            (height, width)
            for height, width in shapes
            if not any(h >= height and w >= width and (h, w) != (height, width) for h, w in shapes)
        )
    )


def center_crop(image: Pixels, size: int) -> tuple[Pixels, np.ndarray]:
    """Scale the shorter side to `size` and cut the centre: `center_crop_arr` of ADM (Dhariwal and Nichol,
    2021), used by DiT, MAR and LatentLM.

    Halve (floor) with the box filter while the shorter side is at least 2·size, then one bicubic resize to
    (round(w·s), round(h·s)), s = size / min(w, h), then cut at ((h - size) // 2, (w - size) // 2). Smaller
    images are enlarged. float32 pixels go through the same filters channel by channel and are clamped to
    [0, 1], as uint8 ones are to [0, 255].

    Args:
        image: [H, W, 1 to 4] uint8, or float32 in [0, 1]: an array, or a tensor on any device.
        size: pixels, at least 1.

    Returns:
        pixels [size, size, C] of the image's kind, dtype and device, and the crop (top, left, height, width) int32 [4]:
        the region that the square shows, in pixels of the image passed in, each rounded to the nearest integer.

    Raises:
        ValueError: shape, dtype or size is not as above.
    """
    _check_image("center_crop", image)
    if size < 1:
        raise ValueError(f"center_crop: expected a size of at least 1 pixel, got {size}")
    height, width = image.shape[:2]
    plan = _adm_plan(height, width, size)
    return run_plan(image, plan), plan.crop()


def _adm_plan(height: int, width: int, size: int) -> Plan:
    box = (0, 0, height, width)
    steps = []
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        steps.append((height, width, "box"))
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    steps.append((height, width, "bicubic"))
    return Plan(box, tuple(steps), ((height - size) // 2, (width - size) // 2, size, size))


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if height > width else (size, longer)


def _center_offset(length: int, kept: int) -> int:
    return round((length - kept) / 2.0)


def _center_plan(height: int, width: int, size: int) -> Plan:
    resized = _short_side(height, width, size)
    top, left = (_center_offset(length, size) for length in resized)
    return Plan((0, 0, height, width), ((*resized, "bilinear"),), (top, left, size, size))


def _words(text: str, seed: int) -> tuple[int, int]:
    """Two numbers of 64 bits. Keys may hold the surrogates of names that are no UTF-8."""
    word = xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed)
    return word >> 64, word & (2**64 - 1)


def _random_plan(height: int, width: int, size: int, seed: int, key: str) -> Plan:
    resized = _short_side(height, width, size)
    top, left = ((word * (length - size + 1)) >> 64 for word, length in zip(_words(key, seed), resized, strict=True))
    return Plan((0, 0, height, width), ((*resized, "bilinear"),), (top, left, size, size))


def _random_resized_plan(height: int, width: int, size: int, seed: int, key: str) -> Plan:
    low, high = (math.log(aspect) for aspect in ASPECTS)
    for attempt in range(10):
        # 53 bits: what a float64 in [0, 1) holds.
        area, aspect = ((word >> 11) * 2.0**-53 for word in _words(f"box {attempt} of {key}", seed))
        area = height * width * (AREAS[0] + (AREAS[1] - AREAS[0]) * area)
        aspect = math.exp(low + (high - low) * aspect)
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            places = _words(f"place {attempt} of {key}", seed)
            top, left = (places[0] * (height - rows + 1)) >> 64, (places[1] * (width - columns + 1)) >> 64
            break
    else:
        rows, columns = min(height, round(width / ASPECTS[0])), min(width, round(height * ASPECTS[1]))
        top, left = (height - rows) // 2, (width - columns) // 2
    return Plan((top, left, rows, columns), ((size, size, "bilinear"),), (0, 0, size, size))


def _nwm_plan(height: int, width: int, size: int) -> Plan:
    if width > height and height * 4 // 3 <= width:
        kept_height, kept_width = height, height * 4 // 3
    else:
        kept_height, kept_width = max(1, width * 3 // 4), width
    box = (_center_offset(height, kept_height), _center_offset(width, kept_width), kept_height, kept_width)
    return Plan(box, ((size, size, "bilinear"),), (0, 0, size, size))


def _buckets_plan(height: int, width: int, shape: tuple[int, int]) -> Plan:
    rows, columns = shape
    if columns * height >= rows * width:  # the width decides, the height has too many rows
        resized = max(rows, (2 * height * columns + width) // (2 * width)), columns
    else:
        resized = rows, max(columns, (2 * width * rows + height) // (2 * height))
    top, left = (resized[0] - rows) // 2, (resized[1] - columns) // 2
    return Plan((0, 0, height, width), ((*resized, "bicubic"),), (top, left, rows, columns))


def run_plan(image: Pixels, plan: Plan) -> Pixels:
    """The pixels [height, width, C] of the plan's window; the image as of `Transform.apply`, of the plan's size."""
    if isinstance(image, np.ndarray):
        whole = np.ascontiguousarray(image)  # torch takes no negative strides
        pixels = torch.from_numpy(whole if whole.flags.writeable else _as_writable(whole))
    else:
        pixels = image
    top, left, height, width = plan.box
    pixels = pixels[top : top + height, left : left + width]
    for step_height, step_width, step_filter in plan.steps[:-1]:
        pixels = resize(pixels, step_height, step_width, step_filter)
    last_height, last_width, last_filter = plan.steps[-1]
    top, left, height, width = plan.window
    pixels = resize(
        pixels, last_height, last_width, last_filter, top=top, left=left, crop_height=height, crop_width=width
    )
    if pixels.dtype == torch.float32:
        pixels.clamp_(0, 1)  # bicubic overshoots
    return pixels.numpy() if isinstance(image, np.ndarray) else pixels


def _as_writable(array: np.ndarray) -> np.ndarray:
    """The same memory, which nobody here writes to, without the flag that torch warns of: a copy of a photograph of 13
    MB costs 16 ms in page faults, decoding it 24. `array` must outlive it."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)


def _check_image(caller: str, image: np.ndarray | Tensor) -> None:
    if image.ndim != 3 or not 1 <= image.shape[2] <= 4 or 0 in image.shape or image.dtype not in DTYPES:
        raise ValueError(f"{caller}: expected uint8 or float32 [H, W, 1 to 4], got {image.dtype} {list(image.shape)}")
