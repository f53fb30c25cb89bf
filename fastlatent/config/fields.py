"""What a setting is, and how a config is made of defaults, a preset, a YAML file and flags."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config file"
_NULL = ("null", "Null", "NULL", "~", "")
MAX_SEED = 2**63 - 1  # what every generator takes
MAX_THREADS = 4096
DEVICE_HELP = "auto (CUDA if there is one), cpu, cuda, cuda:1 or 1 …"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    also: str = "",
) -> Any:
    """A field with a default: `--name VALUE` on the command line, or `--also VALUE`."""
    metadata = _metadata(help, choices, minimum, maximum, positional=False, also=also)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, positional: bool = False, also: str = "") -> Any:
    """A field without a default: `--name VALUE`, or a bare argument if positional; or `--also VALUE`."""
    return dataclasses.field(metadata=_metadata(help, (), None, None, positional=positional, also=also))


def _metadata(
    help: str, choices: tuple[str, ...], minimum: float | None, maximum: float | None, *, positional: bool, also: str
) -> dict[str, Any]:
    return {
        "help": help + (f" (also --{also.replace('_', '-')})" if also else ""),
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "positional": positional,
        "also": also,  # what another project calls it
    }


def build(cls: type, file_values: Mapping[str, Any], flag_values: Mapping[str, Any]) -> Any:
    """Resolve a config: dataclass defaults, then the preset that file or flags name, then the YAML file, then flags.

    Raises:
        ValueError: an unknown key or preset (with the nearest name), a missing one, or a value of the wrong type or
            range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    names = {field.metadata["also"]: name for name, field in fields.items()}
    values: dict[str, Any] = {}
    preset = _preset(cls, flag_values.get("preset", file_values.get("preset"))) if "preset" in fields else {}
    for origin, given in (("preset", preset), (CONFIG_FILE, file_values), ("flag", flag_values)):
        for raw_name, value in given.items():
            name = str(raw_name).replace("-", "_")
            name = names.get(name, name)
            if name not in fields:
                raise ValueError(f"{origin}: unknown key {raw_name!r}{suggest(name, fields)}")
            values[name] = _checked(origin, fields[name], hints[name], value)
    missing = [_flag(field) for field in fields.values() if _is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: give it on the command line or in the config file")
    return cls(**values)


def _preset(cls: Any, name: Any) -> Mapping[str, Any]:
    if name is None or name in _NULL:
        return {}
    if name not in cls.PRESETS:
        raise ValueError(f"preset: unknown recipe {name!r}{suggest(str(name), cls.PRESETS)}")
    return cls.PRESETS[name]


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean …?' for a misspelt name, or the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def given(config: Any, names: typing.Iterable[str]) -> dict[str, Any]:
    """Flag -> value, of those of the settings `names` that are not their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}
    return {"--" + name.replace("_", "-"): value for name, value in changed.items()}


def to_yaml(config: Any) -> str:
    """The resolved config, readable by --config."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, every scalar as its text; ValueError if it is not there or not a mapping.

    Text, because YAML's own guesses surprise: `no` is false, `1e-4` is text, `007` is 7. Fields know their types.
    """
    import yaml

    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not loaded:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def value_type(hint: Any) -> tuple[type, bool]:
    """(plain type, may be None) of a field's annotation; tuple[int, ...] and tuple[str, ...] are given as tuple."""
    if isinstance(hint, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        return inner[0], True
    return (tuple, False) if typing.get_origin(hint) is tuple else (hint, False)


def item_type(hint: Any) -> type:
    """What a tuple holds: int or str; any other field holds one thing of its own type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else value_type(hint)[0]


def _checked(origin: str, field: dataclasses.Field, hint: Any, value: Any) -> Any:
    kind, optional = value_type(hint)
    where = f"{origin}: {field.name}"
    item = item_type(hint)
    if isinstance(value, str) and kind is not str and origin == CONFIG_FILE:
        value = (value,) if kind is tuple and item is str else _parsed(kind, value)
    if optional and (value is None or (origin == CONFIG_FILE and value in _NULL)):
        return None
    if kind is tuple and isinstance(value, list):
        value = tuple(_parsed(item, v) if isinstance(v, str) else v for v in value)
    if kind is float and type(value) is int:
        value = float(value)
    sound = kind is not tuple or (isinstance(value, tuple) and all(type(v) is item for v in value))
    if kind is tuple and item is int:
        sound = sound and (bool(value) or field.default == ())
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if kind is str and isinstance(value, list):
        raise ValueError(f'{where}: expected text, got a list; write it as "{",".join(map(str, value))}"')
    if kind is str and value == "" != field.default:
        raise ValueError(f"{where}: expected text, got nothing")
    if type(value) is not kind or not sound:
        expected = f"a list of {'whole numbers' if item is int else 'texts'}" if kind is tuple else kind.__name__
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
    choices, minimum, maximum = (field.metadata[name] for name in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(choices)}, got {value!r}{_near(value, choices)}")
    if minimum is not None and not value >= minimum:
        raise ValueError(f"{where}: expected at least {minimum}, got {value}")
    if maximum is not None and not value <= maximum:
        raise ValueError(f"{where}: expected at most {maximum}, got {value}")
    return value


def _parsed(kind: type, text: str) -> Any:
    """The value that a text of a YAML file stands for; the text itself where it stands for none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is tuple:
        return tuple(_parsed(int, part.strip()) for part in text.split(","))
    try:
        return kind(text)
    except ValueError:
        return text


def _near(value: Any, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _flag(field: dataclasses.Field) -> str:
    return field.name.upper() if field.metadata["positional"] else "--" + field.name.replace("_", "-")
