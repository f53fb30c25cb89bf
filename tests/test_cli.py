"""The command line, without running a command: parsing, help, exit codes, what is imported."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
import typing

import pytest

from fastlatent import cli, config
from fastlatent.cli import COMMANDS, main

HEAVY = ("torch", "numpy", "PIL", "diffusers", "yaml", "matplotlib")


def required_flags(cls):
    words = []
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            words += [f"the {field.name}"] if field.metadata["positional"] else [flag(field), f"the {field.name}"]
    # Each of these may be given in another way.
    return words + (["--vae", "the vae", "--out", "the out"] if cls is config.EncodeConfig else [])


def flag(field):
    return "--" + field.name.replace("_", "-")


def resolved(capsys, line):
    """What a dry run prints, read back."""
    import yaml

    assert main([*shlex.split(line), "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, line):
    """The one line on stderr of a command line that is refused."""
    try:
        code = main(shlex.split(line))
    except SystemExit as error:  # argparse's way out
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    return err.splitlines()[-1]


def test_defaults_file_flags(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("vae: v\nsize: 64\nbatch-size: 3\n")
    got = resolved(capsys, f"encode images --out o --config {file} --size 128")
    assert (got["vae"], got["size"], got["batch_size"], got["unit_rows"]) == ("v", 128, 3, 4096)


@pytest.mark.parametrize("spelling", ["--cfg_scale 2", "--cfg_scale=2", "--cfg-scale=2", "--cfg-scale 2"])
def test_underscores_in_flags(capsys, spelling):
    assert resolved(capsys, f"sample ck --output my_out_dir {spelling}")["cfg_scale"] == 2.0


def test_underscores_in_values_stay(capsys):
    assert resolved(capsys, "sample a_b --output=c_d --vae e_f")["output"] == "c_d"


@pytest.mark.parametrize("line", ["sample --output o ck", "sample --output=o --seed 3 ck", "sample ck --output o"])
def test_the_bare_argument_goes_anywhere(capsys, line):
    assert resolved(capsys, line)["checkpoint"] == "ck"


def test_lists_and_switches(capsys):
    got = resolved(capsys, "train vae images --out r --block-out-channels 8,16 --mirror --learning-rate 1e-3")
    assert (got["block_out_channels"], got["mirror"], got["learning_rate"]) == ([8, 16], True, 1e-3)
    assert resolved(capsys, "sample ck --output o --no-decode --labels -1")["decode"] is False


def test_lists_of_texts(capsys):
    got = resolved(capsys, "filter d --out o --classes ant 'sea bee' --keys 'a/*' --classes cat")
    assert (got["classes"], got["keys"]) == (["ant", "sea bee", "cat"], ["a/*"])
    for line in ("merge a b --out c", "merge --out c a b", "merge --copy a b --out c"):
        assert resolved(capsys, line)["datasets"] == ["a", "b"]


def test_the_dry_run_of_gc_is_a_setting_of_its_own(capsys):
    assert main(["gc", "nowhere", "--dry-run"]) == 1  # it looks at the dataset
    out, err = capsys.readouterr()
    assert "dry_run: true" in out and "got no folder nowhere" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge --out c", "fastlatent merge: missing DATASETS: give it on the command line"),
        ("filter d", "fastlatent filter: missing --out"),
        ("filter d --out o --class ant", "unknown argument '--class'; did you mean '--classes'?"),
        ("split d --out o", "fastlatent split: missing --fractions"),
        ("stats d --per buckets", "per: expected one of dataset, bucket, got 'buckets'; did you mean 'bucket'?"),
        ("verify d --reencode -1", "flag: reencode: expected at least 0, got -1"),
        ("encode images --vae v --ouut o", "fastlatent encode: unknown argument '--ouut'; did you mean '--out'?"),
        ("encode images --vae v --out o --batch 3", "unknown argument '--batch'; did you mean '--batch-size'?"),
        ("encode images --vae v --ouut=o", "unknown argument '--ouut=o'; did you mean '--out'?"),
        ("encode images more --vae v --out o", "unknown argument 'more'"),
        ("encode images --vae v", "fastlatent encode: missing --out: give it on the command line"),
        ("encode images --vae v --out o --engine tensort", "got 'tensort'; did you mean 'tensorrt'?"),
        ("encode images --vae v --out o --decoder dalli", "decoder: expected one of auto, pillow, nvimagecodec, dali"),
        ("encode images --vae v --out o --max-errors -1", "flag: max_errors: expected at least 0, got -1"),
        ("encode images --vae v --out o --readers 0", "flag: readers: expected at least 1, got 0"),
        ("train ar --out o", "fastlatent train ar: missing LATENTS: give it on the command line"),
        ("train ar l --out o --steps 1.5", "argument --steps: invalid int value: '1.5'"),
        ("train ar l --out o --steps 0", "flag: steps: expected at least 1, got 0"),
        ("train ar l --out o --learning-rate fast", "argument --learning-rate: invalid float value: 'fast'"),
        ("train ar l --out o --learning-rate nan", "flag: learning_rate: expected a finite number, got nan"),
        (
            "train ar l --out o --mixed-precision bf61",
            "mixed_precision: expected one of no, bf16, fp16, got 'bf61'; did you",
        ),
        ("train vae i --out o --block-out-channels 8;9", "expected whole numbers separated by commas, got '8;9'"),
        ("train vae i --out o --block-out-channels 8,", "expected whole numbers separated by commas, got '8,'"),
        ("train vea i --out o", "invalid choice: 'vea'"),
        ("trian", "invalid choice: 'trian'"),
        ("train", "the following arguments are required: MODEL"),
        ("", "the following arguments are required: COMMAND"),
        ("encode images --vae v --out o --config nothing.yaml", "--config nothing.yaml: No such file"),
    ],
)
def test_refused(capsys, line, message):
    assert message in refused(capsys, line)


def test_a_flag_for_the_bare_argument_is_not_suggested(capsys):
    message = refused(capsys, "encode --source images --vae v --out o")
    assert "unknown argument '--source'" in message
    assert "did you mean '--source'" not in message


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_setting_with_its_default(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # a line that ends in "DiT-" would tear the default apart
    cls = COMMANDS[command][0]
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata["positional"]:
            assert f" {field.name.upper()} {field.metadata['help']}" in text
            continue
        # From the setting's help text on, up to the next flag.
        described = re.search(rf" {flag(field)},? .*?{re.escape(field.metadata['help'])}( \([^()]*\))?", text)
        assert described, field.name
        note = (described[1] or "").strip()
        if field.default is dataclasses.MISSING:
            assert note == "(required)"
        elif field.default not in (None, (), ""):
            kind, _ = config.value_type(hints[field.name])
            shown = ",".join(map(str, field.default)) if kind is tuple else str(field.default)
            assert note == f"(default: {shown})"


def test_help_of_the_whole(capsys):
    for line in (["--help"], ["train", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 0
    assert "encode" in capsys.readouterr().out


# The dry runs of gc and decode are settings of their own: they look at what is there.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("gc", "decode")])
def test_dry_run_reads_back(capsys, tmp_path, command):
    cls = COMMANDS[command][0]
    assert main([*command.split(), *required_flags(cls), "--dry-run"]) == 0
    first = capsys.readouterr().out
    file = tmp_path / "settings.yaml"
    file.write_text(first, encoding="utf-8")
    assert main([*command.split(), "--config", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == first
    assert first == "" if cls is config.DoctorConfig else first.startswith(f"# fastlatent {command}\n")


def test_help_and_dry_runs_import_nothing_heavy():
    # One process for all of it; the test process itself has torch loaded.
    lines = [[], *([*command.split(), "--help"] for command in COMMANDS)]
    code = f"""
import sys
from fastlatent.cli import main
for line in {lines!r}:
    try:
        main(line or ["--help"])
    except SystemExit as error:
        assert error.code == 0, line
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
main(["sample", "ck", "--output", "o", "--dry-run"])
loaded = [name for name in {HEAVY!r} if name in sys.modules and name != "yaml"]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["--help", "train ar --help"])
def test_help_answers_at_once(command):
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastlatent", *command.split()], check=True, capture_output=True)
        return time.perf_counter() - start

    # The best of three: an interpreter alone needs 0.02 s, one that imports torch 1.5 s or more.
    assert min(seconds() for _ in range(3)) < 0.3


def test_a_reader_that_went_away_is_no_traceback():
    line = f"{shlex.quote(sys.executable)} -m fastlatent sample ck --output o --dry-run"
    # `true` has ended long before the interpreter has started.
    done = subprocess.run(["bash", "-c", f"{line} | true"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_spelt_is_no_traceback():
    for words in (["sample", "é", "--output", "o", "--dry-run"], ["encode", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "fastlatent", *words],
            capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")


def test_encode_keeps_waiting_threads_off_the_cores_that_decoding_needs(monkeypatch):
    monkeypatch.setattr(cli, "_imported", lambda module, function: lambda config: None)
    for given, left in ((None, "1000"), ("7", "7")):
        monkeypatch.setenv("GOMP_SPINCOUNT", given or "")  # so that it is put back afterwards
        if given is None:
            monkeypatch.delenv("GOMP_SPINCOUNT")
        assert main(["encode", "images", "--vae", "vae", "--out", "out"]) == 0
        assert os.environ["GOMP_SPINCOUNT"] == left
