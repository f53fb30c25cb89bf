"""Checkpoints are whole or not there; what was there survives every failure."""

import os
import shutil
from pathlib import Path

import pytest

from fastlatent.pipeline import checkpoints
from fastlatent.store import files


def write(text):
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_text(text)

    return fill


def saved(run: Path) -> dict[int, str]:
    return {checkpoints.step_of(one): (one / "weights").read_text() for one in checkpoints.checkpoints(run)}


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-000500", 500), ("checkpoint-7", 7), ("checkpoint-1234567", 1234567), ("checkpoint-", None),
     ("checkpoint-x", None), ("a-checkpoint-5", None), ("checkpoint-5.old", None), (".tmp-checkpoint-5-ab", None)],
)  # fmt: skip
def test_step_of(name, step):
    assert checkpoints.step_of(Path("run") / name) == step


def test_saves_and_keeps_the_newest(tmp_path):
    for step in (5, 10, 1_000_000, 1_000_005):
        checkpoints.save(tmp_path / "run", step, write(str(step)), keep=2)
    assert saved(tmp_path / "run") == {1_000_000: "1000000", 1_000_005: "1000005"}
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert (tmp_path / "run" / "checkpoint-1000005" / "deeper" / "file").exists()


def test_a_step_that_is_there_already_stays(tmp_path):
    # The same step of the same run is the same state.
    for text in ("first", "second"):
        checkpoints.save(tmp_path, 5, write(text), keep=1)
    assert saved(tmp_path) == {5: "first"}


def test_seven_digits_come_after_six(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoints.save(tmp_path, step, write(str(step)), keep=5)
    assert list(saved(tmp_path)) == [999_999, 1_000_000]


def test_other_things_in_the_folder_stay(tmp_path):
    for name in ("log.jsonl", "checkpoint-000001.txt", "checkpoint-000003"):
        (tmp_path / name).write_text("mine")  # also a file with a checkpoint's name
    checkpoints.save(tmp_path, 2, write("2"), keep=1)
    checkpoints.save(tmp_path, 4, write("4"), keep=1)
    assert saved(tmp_path) == {4: "4"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000001.txt", "checkpoint-000003", "checkpoint-000004", "log.jsonl",
    ]  # fmt: skip


class CrashError(Exception):
    pass


def crashing(monkeypatch, limit):
    """Every call of the file system from the `limit`-th on fails, as after a kill: also those that would tidy up."""
    calls = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            calls.append(name)
            if len(calls) > limit:
                raise CrashError(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("mkdir", "rename"):
        wrap(Path, name)
    wrap(checkpoints.os, "fsync")
    wrap(checkpoints, "fsync_directory")
    wrap(checkpoints.shutil, "rmtree")
    return calls


def test_a_kill_at_any_call_keeps_the_older_ones(tmp_path, monkeypatch):
    limit = 0
    while True:
        run = tmp_path / str(limit)
        for old in (10, 20):
            checkpoints.save(run, old, write(f"old {old}"), keep=2)
        with monkeypatch.context() as patch:
            calls = crashing(patch, limit)
            try:
                checkpoints.save(run, 30, write("new"), keep=2)
                ended = True
            except CrashError:
                ended = False
        crashed = dict(saved(run))
        checkpoints.remove_temporaries(run)  # what the next run does first
        assert saved(run) == crashed
        assert not list(run.glob(".tmp-*"))
        # At least the newest one from before is there, and whole.
        assert crashed[20] == "old 20", (limit, calls)
        assert crashed.items() <= {10: "old 10", 20: "old 20", 30: "new"}.items()
        if ended:
            break
        limit += 1
    assert limit >= 8  # the loop really visited the calls
    assert saved(run) == {20: "old 20", 30: "new"}


def test_an_error_at_any_call_keeps_the_older_ones(tmp_path, monkeypatch):
    # As above, but the process lives on and tidies up: one call fails, later ones work.
    for failing in range(12):
        run = tmp_path / str(failing)
        for old in (10, 20):
            checkpoints.save(run, old, write(f"old {old}"), keep=2)
        calls = []

        def fail_once(owner, name, calls=calls, failing=failing):
            original = getattr(owner, name)

            def call(*args, **options):
                calls.append(name)
                if len(calls) == failing + 1:
                    raise OSError(28, os.strerror(28))
                return original(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "mkdir"), (Path, "rename"), (checkpoints.os, "fsync"),
                                (checkpoints, "fsync_directory")):  # fmt: skip
                patch.setattr(owner, name, fail_once(owner, name))
            try:
                checkpoints.save(run, 30, write("new"), keep=2)
            except OSError:
                assert len(calls) > failing
        assert saved(run)[20] == "old 20", calls
        assert not list(run.glob(".tmp-*"))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    checkpoints.save(tmp_path, 1, write("1"), keep=1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        checkpoints.save(tmp_path, 2, fail, keep=1)
    assert saved(tmp_path) == {1: "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_leftovers_of_a_kill_go(tmp_path):
    (tmp_path / ".tmp-checkpoint-000002-ab").mkdir()
    (tmp_path / f"{files.TEMPORARY}train.yaml-{'0' * 32}").write_text("x")  # of write_atomic
    checkpoints.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resolve(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoints.save(run, step, write(str(step)), keep=5)
    assert checkpoints.resolve(run, "weights", "model") == run / "checkpoint-000002"
    assert checkpoints.resolve(str(run / "checkpoint-000001"), "weights", "model") == run / "checkpoint-000001"
    (run / "checkpoint-000002" / "weights").unlink()  # a newer one of something else
    assert checkpoints.resolve(run, "weights", "model") == run / "checkpoint-000001"
    shutil.copytree(run / "checkpoint-000001", tmp_path / "copied")
    assert checkpoints.resolve(tmp_path / "copied", "weights", "model") == tmp_path / "copied"


def test_resolve_refuses(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("none", "model: .*none does not exist"),
        ("file/below", "model: .*file/below does not exist"),
        ("empty", "model: expected config.json and weights in .*empty or in its .* folders, found nothing"),
        ("file", "model: expected a folder with config.json and weights, got the file .*file"),
        ("", "found empty, file"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.resolve(tmp_path / name, "weights", "model")


# --- publish ---


def test_publish_gives_the_folder_what_users_load(tmp_path):
    for step, text in ((5, "old"), (10, "new")):
        checkpoints.save(tmp_path, step, write(text), keep=2)
        (checkpoints.checkpoints(tmp_path)[-1] / checkpoints.TRAINING_STATE).write_text("large")
        checkpoints.publish(tmp_path)
        assert (tmp_path / "weights").read_text() == (tmp_path / "deeper" / "file").read_text() == text
    assert not (tmp_path / checkpoints.TRAINING_STATE).exists()
    assert not list(tmp_path.glob(".tmp-*"))
    newest = checkpoints.checkpoints(tmp_path)[-1]
    assert (tmp_path / "weights").stat().st_ino == (newest / "weights").stat().st_ino  # linked, not copied


def test_publish_copies_where_links_are_not_known(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 5, write("5"), keep=2)

    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints.publish(tmp_path)
    assert (tmp_path / "weights").read_text() == (tmp_path / "deeper" / "file").read_text() == "5"


def test_the_newest_checkpoint_goes_before_what_was_published(tmp_path):
    checkpoints.save(tmp_path, 5, write("5"), keep=2)
    checkpoints.publish(tmp_path)
    checkpoints.save(tmp_path, 10, write("10"), keep=2)  # the run went on, and was stopped
    assert checkpoints.resolve(tmp_path, "weights", "run").name == "checkpoint-000010"
    shutil.rmtree(tmp_path / "checkpoint-000010")
    shutil.rmtree(tmp_path / "checkpoint-000005")
    assert checkpoints.resolve(tmp_path, "weights", "run") == tmp_path
