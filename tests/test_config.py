"""Settings: where a value comes from, what is refused, and that what is printed reads back."""

import dataclasses
import math
import typing

import pytest

from fastlatent import config
from fastlatent.cli import COMMANDS

ENCODE = {"source": "images", "vae": "vae", "out": "latents"}
TRAIN_VAE = {"source": "images", "out": "run"}
CONFIGS = [cls for cls, _, _ in COMMANDS.values()]


def required_values(cls):
    """Text for every required setting; names that YAML would read as something else."""
    oddities = iter(("no", "1e-4", "007", "~"))
    hints = typing.get_type_hints(cls)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    needed += ["vae", "out"] if cls is config.EncodeConfig else []  # or others in their place
    return {name: (next(oddities),) if is_list(hints[name]) else next(oddities) for name in needed}


def is_list(hint):
    return config.value_type(hint)[0] is tuple


def other_value(field, hint):
    """A valid value that is not the default."""
    kind, _ = config.value_type(hint)
    choices = field.metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != field.default)
    if kind is bool:
        return not field.default
    if kind is tuple:
        return (8, 16) if config.item_type(hint) is int else ("007", "a, b", "- é")
    if kind is int:
        return (field.default or 2) + 1
    if kind is float:
        return 0.1 + 1e-17 + (field.default or 0.0) / 3  # digits that a short spelling would lose
    return "träge: [#é] 'x' \udcff"  # bytes that are no UTF-8 come as surrogates


def test_flag_beats_file_beats_default():
    from_file = config.build(config.EncodeConfig, ENCODE | {"size": 64, "dtype": "float32"}, {})
    assert (from_file.size, from_file.dtype, from_file.batch_size) == (64, "float32", 0)
    both = config.build(config.EncodeConfig, ENCODE | {"size": 64, "dtype": "float32"}, {"size": 128})
    assert (both.size, both.dtype, both.batch_size) == (128, "float32", 0)


def test_flags_complete_the_file():
    assert config.build(config.EncodeConfig, {"vae": "a", "out": "b"}, {"source": "c"}).source == "c"


@pytest.mark.parametrize("name", ["batch-size", "batch_size"])
def test_file_keys_with_either_dash(name):
    assert config.build(config.EncodeConfig, ENCODE | {name: 3}, {}).batch_size == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 3}, "config file: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ({"zzzz": 3}, "config file: unknown key 'zzzz'; known: all, allow_mixed, batch_size, cache_dir, captions, "),
        ({7: 3}, "config file: unknown key 7"),
        ({"size": "big"}, "config file: size: expected int, got 'big'"),
        ({"size": 1.5}, "config file: size: expected int, got 1.5"),
        ({"size": True}, "config file: size: expected int, got True"),  # a bool is an int to Python
        ({"size": None}, "config file: size: expected int, got None"),
        ({"size": [1]}, r"config file: size: expected int, got \[1\]"),
        ({"size": -1}, "config file: size: expected at least 0, got -1"),
        ({"threads": -1}, "config file: threads: expected at least 0, got -1"),
        ({"mirror": "yes"}, "config file: mirror: expected bool, got 'yes'"),
        ({"mirror": 1}, "config file: mirror: expected bool, got 1"),
        ({"vae": ["a"]}, "config file: vae: expected text, got a list"),
        ({"vae": True}, "config file: vae: expected str, got True"),
        ({"dtype": "flaot16"}, "config file: dtype: expected one of .*; did you mean 'float16'?"),
        ({"dtype": "int4"}, "config file: dtype: expected one of float16, bfloat16, float32, int8, got 'int4'"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config.build(config.EncodeConfig, ENCODE | values, {})


@pytest.mark.parametrize("value", [[], [1.5], ["1.5"], ["a"], [True], [[8]], 32, "", "8,x"])
def test_lists_hold_whole_numbers(value):
    with pytest.raises(ValueError, match="block_out_channels: expected a list of whole numbers"):
        config.build(config.TrainVaeConfig, TRAIN_VAE | {"block_out_channels": value}, {})


@pytest.mark.parametrize(("text", "value"), [("a,b", ("a,b",)), ("[a, 7]", ("a", "7")), ("[]", ())])
def test_lists_of_texts(tmp_path, text, value):
    path = tmp_path / "settings.yaml"
    path.write_text(f"dataset: d\nout: o\nclasses: {text}\n")
    assert config.build(config.FilterConfig, config.read_yaml(str(path)), {}).classes == value


@pytest.mark.parametrize("value", [[7], [["a"]], 7, True])
def test_lists_of_texts_hold_texts(value):
    with pytest.raises(ValueError, match="classes: expected a list of texts"):
        config.build(config.FilterConfig, {"dataset": "d", "out": "o", "classes": value}, {})


@pytest.mark.parametrize("value", [math.nan, "nan", -1e-9, "fast"])
def test_bad_learning_rates(value):
    with pytest.raises(ValueError, match="learning_rate: expected"):
        config.build(config.TrainVaeConfig, TRAIN_VAE | {"learning_rate": value}, {})


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("source", "missing SOURCE: give it on the command line or in the config file"),
        ("vae", r"missing --vae \(or --teacher\): "),
        ("out", "missing --out: "),
    ],
)
def test_missing(missing, message):
    with pytest.raises(ValueError, match=message):
        config.build(config.EncodeConfig, {k: v for k, v in ENCODE.items() if k != missing}, {})


def test_every_missing_setting_is_named_at_once():
    with pytest.raises(ValueError, match=r"missing --vae \(or --teacher\), --out: "):
        config.build(config.EncodeConfig, {}, {"source": "images"})
    with pytest.raises(ValueError, match="missing CHECKPOINT, --output: "):
        config.build(config.SampleConfig, {}, {})


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML 1.1: false
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1: text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("learning_rate: 1.0e-4", "learning_rate", 1e-4),
        ("block_out_channels: [8, 16]", "block_out_channels", (8, 16)),
        ("block_out_channels:\n- 8\n- 16", "block_out_channels", (8, 16)),
        ("out: 12", "out", "12"),
        ("mirror: true", "mirror", True),
        ("mirror: False", "mirror", False),
        ("source: 007", "source", "007"),  # YAML 1.1: 7
        ("source: 1.10", "source", "1.10"),
        ("source: 2024-01-01", "source", "2024-01-01"),
        ("source: yes", "source", "yes"),
    ],
)
def test_yaml_oddities(tmp_path, line, name, value):
    path = tmp_path / "settings.yaml"
    rest = [f"{other}: x" for other in ("source", "out") if other != name]
    path.write_text("\n".join([*rest, line]))
    got = getattr(config.build(config.TrainVaeConfig, config.read_yaml(str(path)), {}), name)
    assert (got, type(got)) == (value, type(value))


def test_yaml_number_for_text(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("checkpoint: run\noutput: samples\nlabels: 3\n")
    assert config.build(config.SampleConfig, config.read_yaml(str(path)), {}).labels == "3"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_empty_yaml_sets_nothing(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert config.read_yaml(str(path)) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of keys to values, got list"),
        (b"text\n", "expected a mapping of keys to values, got str"),
        (b"a: [1\n", "not YAML"),
        (b"a: \xff\n", "not YAML"),
    ],
)
def test_bad_yaml(tmp_path, data, message):
    path = tmp_path / "settings.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"--config {path}: {message}") as caught:
        config.read_yaml(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_in_yaml_is_run(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(f"out: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match="out: expected text"):
        config.build(config.TrainVaeConfig, config.read_yaml(str(path)), {"source": "images"})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("line", ["mirror: yes", "mirror: 1", "mirror: [true]", "mirror: ''"])
def test_switches_are_true_or_false(tmp_path, line):
    path = tmp_path / "settings.yaml"
    path.write_text(f"source: images\nout: run\n{line}\n")
    with pytest.raises(ValueError, match="config file: mirror: expected bool"):
        config.build(config.TrainVaeConfig, config.read_yaml(str(path)), {})


def test_yaml_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--config .*nothing.yaml: No such file"):
        config.read_yaml(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("changed", [False, True])
def test_what_is_printed_reads_back(tmp_path, cls, changed):
    values = required_values(cls)
    if changed:
        hints = typing.get_type_hints(cls)
        values = {field.name: other_value(field, hints[field.name]) for field in dataclasses.fields(cls)}
        if cls is config.EncodeConfig:
            values = {name: value for name, value in values.items() if name not in ("vae", "cache_dir")}
        if cls is config.ConvertConfig:
            values |= {"scaling_factor": "0.5", "format": "auto"}
        if "preset" in values:
            values["preset"] = next(iter(cls.PRESETS), None)
    resolved = config.build(cls, {}, values)
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml(resolved), encoding="utf-8")
    assert config.build(cls, config.read_yaml(str(path)), {}) == resolved


def test_encode_takes_a_teacher_for_the_autoencoder_and_a_cache_for_the_dataset():
    cached = {"data_root": "videos", "teacher": "videomaev2-base", "split": "train", "cache_dir": "cache"}
    resolved = config.build(config.EncodeConfig, {}, cached)
    assert (resolved.source, resolved.out, resolved.vae) == ("videos", "cache/train", None)
    refusals = (
        ({"vae": "v"}, "--vae, --teacher: expected one of them, got both"),
        ({"out": "o"}, "--out o: expected it without --cache-dir, which says cache/train"),
        ({"split": None}, "--cache-dir: expected --split too"),
        ({"frames": (9, 5)}, "--frames: expected rising numbers from 1 on, got 9,5"),
        ({"frames": (0,)}, "--frames: expected rising numbers from 1 on, got 0"),
    )
    for more, message in refusals:
        with pytest.raises(ValueError, match=message):
            config.build(config.EncodeConfig, {}, cached | more)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_defaults_pass_their_own_checks(cls):
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    assert config.build(cls, {}, defaults | required_values(cls)) == cls(**required_values(cls))


def test_settings_of_training_are_those_of_the_loop():
    # _train copies them by name.
    from fastlatent.training.loop import LoopSettings

    names = {field.name for field in dataclasses.fields(config.TrainConfig)}
    assert {field.name for field in dataclasses.fields(LoopSettings)} <= names


# --- presets ---

PRESETS = [(cls, name) for cls in CONFIGS for name in getattr(cls, "PRESETS", {})]


@pytest.mark.parametrize(("cls", "name"), PRESETS, ids=lambda value: getattr(value, "__name__", value))
def test_every_preset_is_valid(cls, name):
    resolved = config.build(cls, {}, required_values(cls) | {"preset": name})
    for key, value in cls.PRESETS[name].items():
        assert getattr(resolved, key) == value


def test_a_preset_gives_way_to_file_and_flags():
    common = {"latents": "l", "out": "o"}
    resolved = config.build(config.TrainArConfig, common | {"preset": "latentlm-medium-tokenizer", "steps": "7"}, {})
    assert (resolved.steps, resolved.batch_size, resolved.weight_decay) == (7, 256, 0.1)
    by_flag = config.build(config.TrainArConfig, common | {"batch_size": "64"}, {"preset": "latentlm-scaling"})
    assert by_flag.batch_size == 64
    flags = {"preset": "latentlm-scaling", "batch_size": 32}
    assert config.build(config.TrainArConfig, common | {"batch_size": "64"}, flags).batch_size == 32


def test_unknown_presets():
    with pytest.raises(ValueError, match="unknown recipe 'latentlm-scalin'; did you mean 'latentlm-scaling'"):
        config.build(config.TrainArConfig, {}, {"latents": "l", "out": "o", "preset": "latentlm-scalin"})
    with pytest.raises(ValueError, match="unknown recipe 'dit'"):  # it is one of train dit
        config.build(config.TrainArConfig, {}, {"latents": "l", "out": "o", "preset": "dit"})
