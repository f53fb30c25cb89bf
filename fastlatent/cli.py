"""Command line: parse into a config, then hand over. Nothing heavy is imported before the arguments are valid."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from typing import Any

import fastlatent
from fastlatent import config

# command -> (config, module under fastlatent.workflows, function)
COMMANDS: dict[str, tuple[type, str, str]] = {
    "encode": (config.EncodeConfig, "encode", "encode"),
    "convert": (config.ConvertConfig, "convert", "convert"),
    "train vae": (config.TrainVaeConfig, "train_vae", "train_vae"),
    "train ar": (config.TrainArConfig, "train_ar", "train_ar"),
    "train dit": (config.TrainDitConfig, "train_dit", "train_dit"),
    "train ddpm": (config.TrainDdpmConfig, "train_ddpm", "train_ddpm"),
    "train pixel-ddpm": (config.TrainPixelDdpmConfig, "train_ddpm", "train_pixel_ddpm"),
    "export": (config.ExportConfig, "export", "export"),
    "sample": (config.SampleConfig, "sample", "sample"),
    "decode": (config.DecodeConfig, "decode", "decode"),
    "gallery": (config.GalleryConfig, "gallery", "gallery"),
    "roundtrip": (config.RoundtripConfig, "roundtrip", "roundtrip"),
    "inspect": (config.InspectConfig, "inspect", "inspect"),
    "verify": (config.VerifyConfig, "verify", "verify"),
    "repair": (config.RepairConfig, "maintain", "repair"),
    "stats": (config.StatsConfig, "maintain", "stats"),
    "gc": (config.GcConfig, "maintain", "gc"),
    "merge": (config.MergeConfig, "maintain", "merge"),
    "split": (config.SplitConfig, "maintain", "split"),
    "filter": (config.FilterConfig, "maintain", "filter"),
    "push": (config.PushConfig, "hub", "push"),
    "pull": (config.PullConfig, "hub", "pull"),
    "doctor": (config.DoctorConfig, "doctor", "doctor"),
}
# command -> what must stand in the environment before torch loads OpenMP, unless the user says otherwise. Threads that
# wait for the next operation spin for milliseconds on the cores that decoding needs: on two cores, clips of 848x480
# H.264 with a small teacher took 116 ms each instead of 89.
ENVIRONMENT = {"encode": {"GOMP_SPINCOUNT": "1000"}}
# Exit codes: 0 done, 1 the job failed, 2 the command line is wrong, 130 interrupted.
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = _parser()
    namespace, unknown = parser.parse_known_args(arguments)
    command, given = namespace.command, vars(namespace)
    cls = COMMANDS[command][0]
    own_dry_run = any(field.name == "dry_run" for field in dataclasses.fields(cls))  # then it is a setting of the job
    general = ("command", "train_command", "config", *(() if own_dry_run else ("dry_run",)))
    flags = {k: v for k, v in given.items() if k not in general}
    try:
        if unknown:
            raise ValueError(_unknown(unknown[0], cls))
        resolved = config.build(cls, config.read_yaml(given["config"]) if given["config"] else {}, flags)
    except ValueError as error:
        print(f"fastlatent {command}: {error}", file=sys.stderr)
        return 2
    return run(command, resolved, only_print=not own_dry_run and given["dry_run"])


def run(command: str, resolved: Any, *, only_print: bool = False) -> int:
    """Print a resolved config and do what it says; what goes wrong becomes a message and an exit code."""
    _, module, function = COMMANDS[command]
    try:
        text = config.to_yaml(resolved)
        if text:
            print(f"# fastlatent {command}\n{text}", end="", flush=True)
        if only_print:
            return 0
        for name, value in ENVIRONMENT.get(command, {}).items():
            os.environ.setdefault(name, value)
        result = _imported(module, function)(resolved)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        then = "go on" if command.startswith(("encode", "convert", "train", "decode", "push", "pull")) else "start over"
        print(f"fastlatent {command}: interrupted; rerun the same command to {then}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to tell it, and flushing at exit must not raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTLATENT_TRACEBACK") or not _expected(error):
            raise
        print(f"fastlatent {command}: {_message(error)}", file=sys.stderr)
        return 1


def train_legacy_ddpm() -> int:
    """`fastlatent train pixel-ddpm`, which also knows what the flags of a script of this name were called."""
    spelled = {
        "--manifest-path": "", "--output-dir": "--out", "--resolution": "--size", "--train-batch-size": "--batch-size",
        "--num-epochs": "--epochs", "--max-train-steps": "--steps", "--gradient-accumulation-steps": "--accumulate",
        "--lr-warmup-steps": "--warmup-steps", "--adam-weight-decay": "--weight-decay", "--adam-epsilon": "--adam-eps",
        "--ema-max-decay": "--ema-decay", "--ddpm-beta-schedule": "--beta-schedule", "--logger": "--trackers",
        "--checkpointing-steps": "--checkpoint-every", "--checkpoints-total-limit": "--keep-checkpoints",
    }  # fmt: skip
    arguments = []
    for argument in map(_dashed, sys.argv[1:]):
        if argument == "--use-ema":  # there is an average unless --ema-decay 0 says otherwise
            continue
        name, equals, value = argument.partition("=")
        arguments.append(spelled.get(name, name) + equals + value if spelled.get(name, name) else value)
    return main(["train", "pixel-ddpm", *(argument for argument in arguments if argument)])


def _imported(module: str, function: str) -> Callable[[Any], Any]:
    """The function of a command. Ctrl-C while torch is imported ends the process at once: nothing is written yet, and
    torch and diffusers would swallow the exception (8 of 40 tries ended in an abort, a traceback or not at all)."""

    def leave(number: int, frame: Any) -> None:
        os.write(2, b"\nfastlatent: interrupted\n")
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        return getattr(importlib.import_module(f"fastlatent.workflows.{module}"), function)
    previous = signal.signal(signal.SIGINT, leave)
    try:
        return getattr(importlib.import_module(f"fastlatent.workflows.{module}"), function)
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


def _expected(error: Exception) -> bool:
    """Whether this is about the user's input or machine, so that its message is enough; else it is our mistake."""
    from safetensors import SafetensorError  # raised by a full disk too

    out_of_memory = isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "allocate memory")
    )
    return isinstance(error, (ValueError, OSError, MemoryError, SafetensorError)) or out_of_memory


def _unknown(argument: str, cls: type) -> str:
    fields = dataclasses.fields(cls)
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    if any(field.name == name for field in fields):
        return f"unknown argument {argument!r}: give {name.upper()} without a flag"
    flags = ["--" + field.name.replace("_", "-") for field in fields if not field.metadata["positional"]]
    return f"unknown argument {argument!r}{config.suggest(argument.split('=')[0], flags)}"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        way_out = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}{way_out}"
    if isinstance(error, (MemoryError, RuntimeError)):
        return f"out of memory ({str(error).splitlines()[0] if str(error) else 'host'}); try a smaller --batch-size"
    return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlatent", description=fastlatent.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastlatent {fastlatent.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = None
    for name, (cls, _, _) in COMMANDS.items():
        if name.startswith("train "):
            if train is None:
                help = "train a model: vae, ar, dit, ddpm or pixel-ddpm"
                parent = commands.add_parser("train", help=help, description=help, allow_abbrev=False)
                train = parent.add_subparsers(dest="train_command", required=True, metavar="MODEL")
            _add_command(train, name.split()[1], name, cls)
        else:
            _add_command(commands, name, name, cls)
    return parser


def _add_command(subparsers: Any, word: str, command: str, cls: type) -> None:
    doc = cls.__doc__ or ""
    help = doc.split(".")[0].replace("%", "%%")
    parser = subparsers.add_parser(word, help=help, description=doc, allow_abbrev=False)
    parser.set_defaults(command=command)
    hints = typing.get_type_hints(cls)
    # Required settings first, then those of the command itself, then what it shares with others.
    for field in sorted(dataclasses.fields(cls), key=lambda f: f.default is not dataclasses.MISSING):
        _add_field(parser, cls, field, hints[field.name])
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a YAML file; flags override it")
    if "dry_run" not in hints:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")


def _add_field(parser: argparse.ArgumentParser, cls: Any, field: dataclasses.Field, hint: Any) -> None:
    kind, _ = config.value_type(hint)
    help = field.metadata["help"].replace("%", "%%")
    if field.name == "preset":
        help += f" ({', '.join(cls.PRESETS) or 'there are none'})"
    if field.metadata["positional"]:
        nargs = "*" if kind is tuple else "?"
        parser.add_argument(field.name, nargs=nargs, default=argparse.SUPPRESS, metavar=field.name.upper(), help=help)
        for other in _others(field):
            parser.add_argument(other, dest=field.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return
    flag = "--" + field.name.replace("_", "-")
    if field.default is dataclasses.MISSING:
        help += " (required)"
    elif field.default not in (None, (), ""):
        default = ",".join(map(str, field.default)) if kind is tuple else field.default
        help += f" (default: {default})"
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help)
        return
    choices = field.metadata["choices"]
    metavar = "|".join(choices) if choices else {int: "N", float: "X", tuple: "N,N,…"}.get(kind, "TEXT")
    if kind is tuple and config.item_type(hint) is str:
        parser.add_argument(flag, nargs="+", action="extend", default=argparse.SUPPRESS, metavar="TEXT", help=help)
        return
    parse: Any = _whole_numbers if kind is tuple else kind
    parser.add_argument(
        flag, *_others(field), dest=field.name, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=help
    )


def _others(field: dataclasses.Field) -> list[str]:
    """What another project calls this flag."""
    also = field.metadata["also"]
    return ["--" + also.replace("_", "-")] if also else []


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


def _dashed(argument: str) -> str:
    """--cfg_scale=3 is --cfg-scale=3: the projects that users come from spell flags either way."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
