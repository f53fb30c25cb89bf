"""Experiment folders: the latents that a video pipeline stored of its denoising steps, and which of them to take.

ROOT/configs/generation_config.yaml, ROOT/latents/PROMPT/VIDEO/step_*.npy.gz with step_*_metadata.json beside it. Runs
with one folder for each video (latents/p000_b000_s000/step_*) are read too; their prompt is "". Torch-free.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

SUFFIXES = (".npy", ".npy.gz", ".pt", ".pt.gz", ".safetensors")
CONFIG = "configs/generation_config.yaml"
MAX_SETTINGS_BYTES = 1 << 20  # a real one has 3 KB
MAX_SETTINGS_NODES = 100_000  # with every alias written out: nine lines of aliases can stand for 10^9 values
LISTED = 20  # names an error lists


@dataclass(frozen=True)
class Step:
    """One stored latent: the prompt's folder ("" where there is none), the video's, "step_000", and the file."""

    prompt: str
    video: str
    name: str
    path: Path

    @property
    def folder(self) -> str:
        """PROMPT/VIDEO, or VIDEO where there are no prompt folders."""
        return f"{self.prompt}/{self.video}" if self.prompt else self.video


@dataclass(frozen=True)
class Experiment:
    """What an experiment folder holds.

    Attributes:
        root: the folder as it was given.
        steps: sorted by prompt, video and step, numbers by their value.
        settings: the YAML; {} where there is none that can be read.
        problem: why `settings` is empty; None where it is not.
    """

    root: Path
    steps: tuple[Step, ...]
    settings: dict[str, Any]
    problem: str | None = None

    def model_id(self) -> str:
        """model_settings.model_id. Raises ValueError where there is none, with what is there instead."""
        value = self._setting("model_settings", "model_id")
        if isinstance(value, str) and value.strip():
            return value.strip()
        path = self.root / CONFIG
        section = self.settings.get("model_settings")
        if self.problem is not None:
            what = self.problem
        elif not isinstance(section, dict):
            what = f"{path}: expected model_settings.model_id, got the sections {_listed(map(str, self.settings))}"
        elif "model_id" not in section:
            what = f"{path}: expected model_settings.model_id, got model_settings with {_listed(map(str, section))}"
        else:
            what = f"{path}: expected text for model_settings.model_id, got {value!r:.80}"
        raise ValueError(f"{what}; which model made the latents is not known: name its autoencoder with --vae")

    def fps(self) -> float | None:
        """video_settings.fps in frames a second, also written as text ("16", "24000/1001"); None where there is none.

        Raises ValueError where it is no positive number.
        """
        value = self._setting("video_settings", "fps")
        if value is None:
            return None
        number = _number(value)
        if number is None or not 0 < number <= 1000:
            raise ValueError(
                f"{self.root / CONFIG}: expected video_settings.fps to be a positive number up to 1000, got "
                f"{value!r:.80}; give --fps"
            )
        return number

    def size(self) -> tuple[int, int, int] | None:
        """(frames, height, width) in pixels from video_settings, frames otherwise int(fps·duration); None where one of
        the three is missing or no positive whole number."""
        names = ("frames", "height", "width", "fps", "duration")
        frames, height, width, fps, duration = (_number(self._setting("video_settings", name)) for name in names)
        if frames is None and fps is not None and duration is not None and 0 < fps * duration < 1e9:
            frames = float(int(fps * duration))
        sides = [side for side in (frames, height, width) if side is not None and side >= 1 and side == int(side)]
        return (int(sides[0]), int(sides[1]), int(sides[2])) if len(sides) == 3 else None

    def _setting(self, section: str, name: str) -> Any:
        values = self.settings.get(section)
        return values.get(name) if isinstance(values, dict) else None


def open_experiment(root: Path) -> Experiment:
    """List the steps below root/latents and read root/configs/generation_config.yaml.

    Hidden and unfinished files (.x, x.tmp.npy, x.part.npy) are left out; links are followed. Damaged or missing
    settings are told by Experiment.problem and by model_id().

    Raises:
        ValueError: no such folder, no latents in it, or one step in two formats.
    """
    root = Path(root)
    if not os.path.isdir(root):
        got = "a file" if os.path.exists(root) else "nothing there"
        raise ValueError(f"{root}: expected an experiment folder, got {got}")
    found: dict[tuple[str, str, str], Path] = {}
    for step in _walk(root / "latents"):
        other = found.setdefault((step.prompt, step.video, step.name), step.path)
        if other != step.path:
            raise ValueError(
                f"{step.path.parent}: {other.name} and {step.path.name} are both {step.name}; which one is meant? "
                "Move the other away"
            )
    if not found:
        raise ValueError(
            f"{root}: expected latents/PROMPT/VIDEO/step_* that end in {', '.join(SUFFIXES)}, got "
            f"{_what_is_there(root)}"
        )
    order = sorted(found, key=lambda key: [*map(natural_order, key)])
    settings, problem = _read_settings(root / CONFIG)
    return Experiment(root, tuple(Step(*key, found[key]) for key in order), settings, problem)


def step_metadata(step: Step) -> dict[str, Any]:
    """What was stored beside a step (prompt, timestep, sigma …); {} where that is missing or damaged.

    NaN and infinities, which JSON does not have, become None."""
    path = step.path.with_name(f"{step.name}_metadata.json")
    try:
        if not path.is_file() or path.stat().st_size > MAX_SETTINGS_BYTES:
            return {}
        values = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def natural_order(name: str) -> tuple[tuple[Any, ...], str]:
    """Sorting key by which step_2 comes before step_10."""
    parts = re.split("([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def select(
    steps: Sequence[Step],
    prompt_filter: str | None = None,
    video_filter: str | None = None,
    step_filter: str | None = None,
) -> tuple[list[Step], list[str]]:
    """The steps that pass all filters, in their order, and warnings: a line for each part that matched nothing.

    A filter is a list separated by commas; a name passes if one part matches all of it (a folder's name, or "step_000"
    without its ending). A part means, whichever comes first: the name that is written just so, also one with commas or
    brackets in it (of several readings the longest); `first`, `last`, `every:N` (those at places 0, N, 2N …); a glob,
    where capitals count. Places are counted before other filters: of prompts in the experiment, of videos in each
    prompt, of steps in each video.

    Raises:
        ValueError: a filter without parts or with every:0, one that matches nothing (with what there is), or filters
            that leave nothing together.
    """
    left, warnings = list(steps), list[str]()
    filters: list[tuple[str, str | None, Callable[[Step], str], Callable[[Step], Any]]] = [
        ("prompt", prompt_filter, lambda step: step.prompt, lambda step: None),
        ("video", video_filter, lambda step: step.video, lambda step: step.prompt),
        ("step", step_filter, lambda step: step.name, lambda step: (step.prompt, step.video)),
    ]
    for what, text, name_of, group_of in filters:
        if text is None:
            continue
        groups: dict[Any, dict[str, None]] = {}
        for step in steps:
            if name_of(step):  # a video without a prompt's folder has no name that a prompt filter could match
                groups.setdefault(group_of(step), {})[name_of(step)] = None
        passing, unmatched = _passing(what, text, {key: list(names) for key, names in groups.items()})
        warnings += unmatched
        remaining = [step for step in left if (group_of(step), name_of(step)) in passing]
        if not remaining:
            there = _listed(dict.fromkeys(name_of(step) for step in left))
            raise ValueError(f"{what} filter {text!r} matches none of what the filters before it left: {there}")
        left = remaining
    return left, warnings


def _passing(what: str, text: str, groups: dict[Any, list[str]]) -> tuple[set[tuple[Any, str]], list[str]]:
    """The (group, name) that pass one filter, and a warning for each part without any."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise ValueError(f"{what} filter {text!r}: there are no {what} folders, only latents/VIDEO/step_*")
    passing: set[tuple[Any, str]] = set()
    unmatched = []
    parts = _parts(text, set(names))
    if not parts:
        raise ValueError(f"{what} filter: expected names separated by commas, got {text!r}")
    for part in parts:
        matched = {(key, name) for key, group in groups.items() for name in _matching(what, part, group, names)}
        passing |= matched
        if not matched:
            unmatched.append(f"{what} filter: {part!r} matches nothing{_near(part, names)}")
    if not passing:
        hint = "".join(_near(part, names) for part in parts[:1])
        raise ValueError(f"{what} filter {text!r} matches nothing{hint}; there are: {_listed(names)}")
    return passing, unmatched


def _parts(text: str, names: set[str]) -> list[str]:
    """The text split at its commas, but not inside a name that has some."""
    pieces = text.split(",")
    longest = 1 + max(name.count(",") for name in names)
    parts, start = [], 0
    while start < len(pieces):
        part, taken = pieces[start].strip(), 1
        for length in range(min(longest, len(pieces) - start), 0, -1):
            joined = ",".join(pieces[start : start + length])
            if name := next((form for form in (joined, joined.strip()) if form in names), ""):
                part, taken = name, length
                break
        if part:
            parts.append(part)
        start += taken
    return parts


def _matching(what: str, part: str, group: list[str], names: list[str]) -> list[str]:
    """Those of one group's names that a part matches. `names`: of all groups, so that a part means one thing."""
    if part in names:
        return [part] if part in group else []
    if part in ("first", "last"):
        return group[:1] if part == "first" else group[-1:]
    if part.startswith("every:"):
        number = part.removeprefix("every:")
        if not re.fullmatch("[0-9]{1,18}", number) or not int(number):
            raise ValueError(f"{what} filter: expected every:N with a whole number N of at least 1, got {part!r}")
        return group[:: int(number)]
    return [name for name in group if fnmatch.fnmatchcase(name, part)]


def _near(part: str, names: list[str]) -> str:
    """'; did you mean …?': the same numbers written otherwise, then the same last number, then like letters."""

    def plain(name: str) -> str:
        return re.sub("0+(?=[0-9])", "", name).lower()

    same = [name for name in names if plain(name) == plain(part)]
    if not same and re.fullmatch("[0-9]+", part):
        same = [name for name in names if re.findall("[0-9]+", plain(name))[-1:] == [plain(part)]]
    near = same or difflib.get_close_matches(part, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) if re.search(r"[^\w.-]", name) else name for name in names[:LISTED]) + more or "none"


def _walk(latents: Path) -> Iterator[Step]:
    for prompt in _scan(latents):
        if not _is_folder(prompt):
            continue
        for entry in _scan(Path(prompt)):
            if _is_folder(entry):
                for file in _scan(Path(entry)):
                    if (name := _step_name(file)) is not None:
                        yield Step(prompt.name, entry.name, name, Path(file))
            elif (name := _step_name(entry)) is not None:
                yield Step("", prompt.name, name, Path(entry))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, without hidden names; [] where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _step_name(entry: os.DirEntry[str]) -> str | None:
    """ "step_000" of step_000.npy.gz; None of what is no step. A broken link is one: reading it says so."""
    suffix = next((suffix for suffix in SUFFIXES if entry.name.endswith(suffix)), None)
    if suffix is None or not entry.name.startswith("step_") or _is_folder(entry):
        return None
    name = entry.name.removesuffix(suffix)
    return None if name.endswith((".tmp", ".part")) else name


def _what_is_there(root: Path) -> str:
    latents = root / "latents"
    if not latents.is_dir():
        inside = _listed(entry.name for entry in _scan(root))
        if root.name == "latents" and any(_walk(root)):
            return f"the latents themselves; give the folder above, {root.absolute().parent}"
        below = [entry.name for entry in _scan(root) if _is_folder(entry) and (Path(entry) / "latents").is_dir()]
        hint = f"; give one of the experiments: {_listed(below)}" if below else ""
        return f"no folder latents but: {inside}{hint}"
    files = [
        os.path.relpath(os.path.join(top, name), latents)
        for top, _, names in os.walk(latents)
        for name in names
        if not name.startswith(".")
    ]
    files.sort(key=natural_order)
    if files:
        return f"other files in {latents}: {_listed(files)}"
    folders = [entry.name for entry in _scan(latents)]
    return f"empty folders in {latents}: {_listed(folders)}" if folders else f"an empty {latents}"


def _read_settings(path: Path) -> tuple[dict[str, Any], str | None]:
    """(the YAML, None), or ({}, why there is none). Nothing but plain YAML is read: no tags, no bombs of aliases."""
    import yaml

    try:
        if not path.is_file():
            there = _listed(entry.name for entry in _scan(path.parent)) if path.parent.is_dir() else "no folder configs"
            return {}, f"{path}: expected the experiment's settings, got nothing there (in {path.parent}: {there})"
        if (size := path.stat().st_size) > MAX_SETTINGS_BYTES:
            return {}, f"{path}: expected at most {MAX_SETTINGS_BYTES} bytes of settings, got {size}"
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        if node is None:
            return {}, f"{path}: expected the experiment's settings, got an empty file"
        _count_nodes(node, {})
        values = loader.construct_document(node)
    except OSError as error:
        return {}, f"{path}: cannot be read: {error.strerror}"
    # PyYAML's constructors let KeyError, IndexError, AttributeError … out of `!!bool x`, `!!int ""`, `!!timestamp x`.
    except Exception as error:
        return {}, f"{path}: not plain YAML: {type(error).__name__}: {' '.join(str(error).split()):.300}"
    if not isinstance(values, dict):
        return {}, f"{path}: expected a mapping of sections, got {type(values).__name__}"
    return values, None


def _count_nodes(node: Any, counted: dict[int, int]) -> int:
    """Nodes below a YAML node with every alias written out; ValueError above MAX_SETTINGS_NODES or in a cycle."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError("an alias inside of what it stands for")
        return counted[id(node)]
    counted[id(node)] = 0
    children = node.value if isinstance(node.value, list) else []
    total = 1
    for child in children:
        total += sum(_count_nodes(part, counted) for part in (child if isinstance(child, tuple) else (child,)))
    if total > MAX_SETTINGS_NODES:
        raise ValueError(f"more than {MAX_SETTINGS_NODES} values, with aliases written out")
    counted[id(node)] = total
    return total


def _number(value: Any) -> float | None:
    """A finite number, also from text such as "16", "16.0" or "24000/1001"; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if isinstance(value, str) and "/" in value:
            value = Fraction(value.replace(" ", ""))
        number = float(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None
