import sys

import pytest

from fastlatent.pipeline import progress as module
from fastlatent.pipeline.progress import Progress


class Clock:
    """time.monotonic that only moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_plain_lines(clock, capsys):
    with Progress("encode", 1000, "images") as progress:
        progress.advance(100)
        assert capsys.readouterr().err == ""  # not before 10 s
        clock.now += 10
        progress.advance(100, "3 bad")
        assert capsys.readouterr().err == "encode: 200/1,000 images, 20.0 images/s, 40 s left, 3 bad\n"
        clock.now += 9.9
        progress.advance(100)
        assert capsys.readouterr().err == ""
        clock.now += 30.1
        progress.advance(700)
        capsys.readouterr()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "encode: 1,000/1,000 images, 20.0 images/s, 50 s, 3 bad\n")


def test_a_terminal_has_one_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 10, "steps") as progress:
        for _ in range(3):
            clock.now += 0.2
            progress.advance()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r\x1b[2K") == 4  # three steps and the end
    clock.now += 0.01
    with Progress("train", 10, "steps") as progress:
        progress.advance()
        assert capsys.readouterr().err == ""  # redrawn ten times a second at most


def test_work_done_before_does_not_count_towards_the_rate(clock, capsys):
    with Progress("train", 100, "steps", done=50) as progress:
        clock.now += 10
        progress.advance(25)
        assert capsys.readouterr().err == "train: 75/100 steps, 2.5 steps/s, 10 s left\n"


def test_an_error_leaves_no_last_line_in_a_log_but_ends_that_of_a_terminal(clock, capsys, monkeypatch):
    with pytest.raises(ValueError), Progress("train", 10, "steps"):
        raise ValueError
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError), Progress("train", 10, "steps"):
        raise ValueError
    assert capsys.readouterr().err.endswith("\n")


def test_nothing_to_do_says_nothing(clock, capsys):
    with Progress("encode", 0, "images"):
        clock.now += 100
    assert capsys.readouterr().err == ""


def test_no_time_and_no_work_divide_nothing(clock, capsys):
    with Progress("encode", 10, "images"):
        pass
    assert capsys.readouterr().err == "encode: 0/10 images, 0.0 images/s, 0.0 s\n"
    with Progress("encode", 10, "images") as progress:
        clock.now += 10
        progress.advance(0)
        assert capsys.readouterr().err == "encode: 0/10 images, 0.0 images/s\n"  # no rate: no end in sight


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"),
     (3599.4, "59 min 59 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert module.duration(seconds) == text
