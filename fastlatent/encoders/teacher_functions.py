"""Teachers of others: any function from a clip to tokens, by entry point or as "module:function".

What is named is a factory: `factory(weights: str | None, device: torch.device, dtype: torch.dtype)` returns a callable

    float32 [3, T, H, W] on the device, normalised  →  floating point [N, D], tokens numbered time first

which is run clip by clip, without gradients; or with the attribute `batched = True`, [B, 3, T, H, W] → [B, N, D]. N and
D must be the same for all clips of one shape. `weights` is what --teacher-weights says, `dtype` what --compute-dtype
says: both are for the factory to use or to leave. The callable may have these attributes:

    clip        (T, H, W): the only clips that it takes. Needed for a projection
    mean, std   three numbers each: pixels are (x / 255 − mean) / std. Without them ImageNet's
    identity    () → dict for JSON: what changes its output besides its name, version and weights

A package offers one in its pyproject.toml, and `--teacher my-teacher` then finds it:

    [project.entry-points."fastlatent.teachers"]
    my-teacher = "my_package.teachers:make"
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.token_readout import MEAN, STD, Readout, normalize_clips

GROUP = "fastlatent.teachers"

Factory = Callable[[str | None, torch.device, torch.dtype], Any]


class FunctionTeacher:
    """A callable as a ClipEncoder. It runs eagerly only, in whatever dtype it likes.

    Args:
        function: what the factory gave; see the module's docstring.
        settings: of `Readout`.
        origin: the part of `identity` that says where the function comes from.
        reload: makes it again in float32.

    Raises:
        ValueError: its attributes or its tokens are not what they should be, or the settings need what it lacks.
    """

    payload = "tokens"
    size_multiple = 1

    def __init__(
        self, name: str, function: Any, device: torch.device, settings: dict[str, Any], origin: dict[str, Any],
        reload: Callable[[], FunctionTeacher],
    ) -> None:  # fmt: skip
        if not callable(function):
            raise ValueError(f"--teacher {name}: expected a factory of a callable, it gave {_kind(function)}")
        self.device = device
        self.clip: tuple[int, int, int] | None = _numbers(name, function, "clip", int)
        self._mean = _numbers(name, function, "mean", (int, float)) or MEAN
        self._std = _numbers(name, function, "std", (int, float)) or STD
        if (self.clip and min(self.clip) < 1) or min(self._std) <= 0:
            raise ValueError(f"--teacher {name}: expected clip and std above 0, got {self.clip} and {self._std}")
        self._name, self._function, self._settings, self._reload = name, function, settings, reload
        self._batched = getattr(function, "batched", False) is True
        self._origin = origin
        self._tokens: dict[tuple[int, int, int], tuple[int, int]] = {}  # clip → N, D
        self._readouts: dict[int, Readout] = {}
        if self.clip is None and settings["project_to"]:
            raise ValueError(
                f"--teacher {name} --project-to {settings['project_to']}: the projection belongs to the teacher's "
                "identity, so that its width must be known beforehand: give the callable an attribute clip = (T, H, W)"
            )
        if self.clip is not None:
            self.row_shape(*self.clip)

    def row_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Runs it on a black clip of a new shape, once."""
        clip = (frames, height, width)
        if self.clip not in (None, clip):
            raise ValueError(f"--teacher {self._name} takes clips of (T, H, W) = {self.clip} only, got {clip}")
        if clip not in self._tokens:
            black = torch.zeros(1, *clip, 3, dtype=torch.uint8, device=self.device)
            tokens = self._run(self.prepare(black), None)
            self._readout(tokens.shape[2])
            self._tokens[clip] = (tokens.shape[1], tokens.shape[2])
        count, dim = self._tokens[clip]
        return self._readout(dim).row_shape(count)

    def prepare(self, clips: Tensor) -> Tensor:
        return normalize_clips(clips, self._mean, self._std)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(f"expected pixels [B, 3, T, H, W], got {list(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        self.row_shape(frames, height, width)
        expected = self._tokens[(frames, height, width)]
        tokens = self._run(pixels.to(self.device, torch.float32), expected)
        rows: Tensor = self._readout(expected[1])(tokens)
        return rows.float()

    def encoder(self) -> nn.Module:
        raise ValueError(f"--teacher {self._name}: a function runs with --engine eager only")

    def upcast(self) -> FunctionTeacher:
        again = self._reload()
        if again.identity() != self.identity():
            raise ValueError(f"--teacher {self._name}: it changed since it was loaded; run the command again")
        return again

    def identity(self) -> dict[str, Any]:
        own = getattr(self._function, "identity", None)
        readout = self._readout(self._tokens[self.clip][1]).identity() if self.clip else None
        settings = {"token_norm": self._settings["token_norm"], "pool": self._settings["pool"], "projection": None}
        return {
            "class": "function",
            **self._origin,
            "clip": list(self.clip) if self.clip else None,
            **(readout or settings),
            "mean": list(self._mean),
            "std": list(self._std),
            **({"own": self._own(own)} if callable(own) else {}),
        }

    def _own(self, identity: Callable[[], Any]) -> Any:
        with _naming(self._name):
            own = identity()
        try:
            json.dumps(own, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--teacher {self._name}: expected identity() to give a dict for JSON, got {str(own)[:200]}: {error}"
            ) from None
        return own

    def _readout(self, dim: int) -> Readout:
        if dim not in self._readouts:
            self._readouts[dim] = Readout(dim, None, **self._settings).to(self.device)
        return self._readouts[dim]

    @torch.inference_mode()
    def _run(self, pixels: Tensor, expected: tuple[int, int] | None) -> Tensor:
        """[B, N, D]; expected: N and D."""
        if self._batched:
            return self._checked(self._called(pixels), len(pixels), expected)
        found: list[Tensor] = []
        for clip in pixels:
            found.append(self._checked(self._called(clip), None, expected))
            expected = expected or (found[0].shape[0], found[0].shape[1])
        return torch.stack(found)

    def _called(self, pixels: Tensor) -> Any:
        with _naming(self._name):
            return self._function(pixels)

    def _checked(self, tokens: Any, batch: int | None, expected: tuple[int, int] | None) -> Tensor:
        form = [*([] if batch is None else [batch]), *(expected or ("N", "D"))]
        good = isinstance(tokens, Tensor) and tokens.is_floating_point() and tokens.ndim == len(form)
        good = good and all(
            size > 0 and want in (size, "N", "D") for size, want in zip(tokens.shape, form, strict=True)
        )
        if not good or tokens.device.type != self.device.type:
            raise ValueError(
                f"--teacher {self._name}: expected floating point tokens [{', '.join(map(str, form))}] on "
                f"{self.device}, it gave {_kind(tokens)}"
            )
        return tokens


def load_function(
    name: str, weights: str | None, device: torch.device, dtype: torch.dtype, settings: dict[str, Any],
    others: tuple[str, ...],
) -> FunctionTeacher:  # fmt: skip
    """The teacher of an entry point or of "module:function". others: names to tell who asks for an unknown one.

    Raises:
        ValueError: there is none of that name, it does not import, or see `FunctionTeacher`.
    """
    factory, origin = _named(name) if ":" in name else _entry_point(name, others)
    if not callable(factory):
        raise ValueError(f"--teacher {name}: expected a function that makes the teacher, got {_kind(factory)}")
    origin = {"name": name, **origin}
    if weights is not None:
        path = Path(weights).expanduser()
        origin["weights"] = file_digest(path) if path.exists() else weights
    with _naming(name):
        function = factory(weights, device, dtype)
    return FunctionTeacher(
        name, function, device, settings, origin,
        lambda: load_function(name, weights, device, torch.float32, settings, others),
    )  # fmt: skip


def _named(name: str) -> tuple[Any, dict[str, Any]]:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(
            f"--teacher {name}: {module_name} does not give it: {type(error).__name__}: {error}"
        ) from error
    owners = importlib.metadata.packages_distributions().get(module_name.partition(".")[0], [])
    if owners:
        return found, {"distribution": owners[0], "version": importlib.metadata.version(owners[0])}
    file = getattr(sys.modules[module_name], "__file__", None)  # of no package: the file itself says what it was
    return found, {"source": file_digest(Path(file)) if file else None}


def _entry_point(name: str, others: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    every = importlib.metadata.entry_points(group=GROUP)
    found = [entry for entry in every if entry.name == name]
    if len(found) != 1:
        if found:
            owners = ", ".join(sorted(entry.dist.name if entry.dist else "?" for entry in found))
            raise ValueError(f"--teacher {name}: several packages offer one of this name: {owners}")
        installed = ", ".join(sorted({entry.name for entry in every})) or "none is installed"
        raise ValueError(
            f"--teacher: expected one of {', '.join(others)}, an entry point of {GROUP} ({installed}) or "
            f"MODULE:FUNCTION, got {name!r}"
        )
    entry = found[0]
    try:
        factory = entry.load()
    except Exception as error:  # as above
        raise ValueError(f"--teacher {name}: {entry.value} does not load: {type(error).__name__}: {error}") from error
    dist = entry.dist
    return factory, {"distribution": dist.name if dist else None, "version": dist.version if dist else None}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _numbers(name: str, function: Any, attribute: str, kind: Any) -> Any:
    """An attribute of three numbers as a tuple, or None."""
    value = getattr(function, attribute, None)
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(one, kind) and not isinstance(one, bool) for one in numbers):
        raise ValueError(f"--teacher {name}: expected three numbers as its {attribute}, got {value!r}")
    return numbers


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What a teacher's own code raises is told as its, with the place; a full memory or disk stays what it is."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error)):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--teacher {name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}; with "
            "FASTLATENT_TRACEBACK=1 all of it is shown)"
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__}"
