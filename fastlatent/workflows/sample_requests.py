"""What a sample is asked to be: its label, its conditions, its start noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlatent.config import SampleConfig, suggest
from fastlatent.diffusion.noise import philox
from fastlatent.sources.conditions import MAX_FLOAT32, condition_values

LABEL_CALL = 2**63  # of the noise's generator: neither a token's nor a step's number


def sample_labels(config: SampleConfig, num_classes: int) -> Tensor:
    """int64 [samples]; ValueError for a text that is none, or a class that is not there."""
    if config.labels == "random":
        if config.per_class != SampleConfig.per_class:
            raise ValueError("--per-class: random labels are drawn for each sample; give --num alone")
        if not config.num:
            raise ValueError("--labels random: give --num, how many samples")
        return torch.tensor([int(philox(config.seed, i, LABEL_CALL).integers(num_classes)) for i in range(config.num)])
    labels = parse_labels(config.labels, num_classes).repeat_interleave(config.per_class)
    return labels[torch.arange(config.num) % len(labels)] if config.num else labels


def parse_labels(text: str, num_classes: int) -> Tensor:
    """ "3,1,4" or "all" → int64 [B]; ValueError for anything else or a class that is not there."""
    if text == "all":
        return torch.arange(num_classes)
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--labels: expected class numbers such as "3,1,4", "all" or "random", got {text!r}') from None
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"--labels: expected 0 to {num_classes - 1} (this checkpoint's classes), got {label}")
    return torch.tensor(labels)


def read_conditions(text: str, known: tuple[tuple[str, int], ...]) -> list[dict[str, Any]]:
    """The objects of --cond: JSON, or a file of it; one, or a list.

    Raises:
        ValueError: it does not read as JSON; a name is not of the model; a value is neither null nor as many finite
            numbers as the condition has.
    """
    origin = "--cond"
    if not text.lstrip().startswith(("{", "[")):
        origin = f"--cond {text}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{origin}: expected a JSON object or a file of it: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{origin}: expected a JSON object or a file of it, got bytes that are no text") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON: {error}") from None
    objects = values if isinstance(values, list) else [values]
    if not objects:
        raise ValueError(f"{origin}: expected at least one object in the list, got none")
    counts: dict[str, int | None] = dict(known)
    if "wind_mag" in counts:
        counts.setdefault("wind", None)  # wind_mag is its length, whatever the number of its components
    for given in objects:
        if not isinstance(given, dict):
            raise ValueError(f"{origin}: expected an object such as {_example(known)}, got {given!r:.80}")
        for name, value in given.items():
            if name not in counts:
                raise ValueError(
                    f"{origin}: unknown condition {name!r}{suggest(name, counts)}; this model's: {_spec(known)}"
                )
            _check(origin, name, value, counts[name])
    return objects


def condition_rows(objects: list[dict[str, Any]], known: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    """(values float64 [B, all numbers], present float64 [B, names]) of what `read_conditions` gave; as of manifests."""
    rows = [condition_values(known, given) for given in objects]
    values, present = ([row[name] for row in rows] for name in ("condition", "condition_present"))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(present, dtype=torch.float64)


def _check(origin: str, name: str, value: Any, count: int | None) -> None:
    if value is None:
        return
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= MAX_FLOAT32:
            raise ValueError(f"{origin}: expected finite numbers, or null, for {name}, got {number!r:.80}")
    if (count is not None and len(numbers) != count) or not numbers:
        wanted = "at least 1" if count is None else count
        raise ValueError(f"{origin}: expected {wanted} numbers for {name}, got {len(numbers)}: {value!r:.80}")


def _spec(known: tuple[tuple[str, int], ...]) -> str:
    return ",".join(f"{name}:{count}" for name, count in known)


def _example(known: tuple[tuple[str, int], ...]) -> str:
    return json.dumps({name: 0 if count == 1 else [0] * count for name, count in known})


def read_noise(file: str, count: int, num_tokens: int, channels: int) -> Tensor:
    """Start noise [B, N, C] of the tokens, in float64.

    Raises:
        ValueError: it cannot be read, or does not have this shape.
    """
    shape = (num_tokens, channels)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--noise {file}: not a readable safetensors file: {error}") from None
    if "noise" not in tensors:
        raise ValueError(f"--noise {file}: expected a tensor `noise`, found {', '.join(tensors) or 'none'}")
    noise = tensors["noise"]
    if noise.shape != (count, *shape):
        raise ValueError(
            f"--noise {file}: expected [{count}, {shape[0]}, {shape[1]}] [samples, tokens, channels], got "
            f"{list(noise.shape)}; --labels times --per-class gives the samples"
        )
    if not noise.is_floating_point() or not noise.isfinite().all():
        raise ValueError(f"--noise {file}: expected finite floating-point numbers, got {noise.dtype}")
    return noise.double()


def columns_of_sheet(config: SampleConfig, count: int) -> int:
    """The samples of a label side by side; otherwise about as many rows as columns."""
    return config.per_class if config.per_class > 1 else max(4, math.isqrt(count - 1) + 1)
