import threading

import pytest

from fastlatent.pipeline import meter as module
from fastlatent.pipeline.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_shares_are_of_the_threads_of_a_stage(clock):
    meter = Meter({"decode": 4, "encode": 1})
    meter.add("decode", 8.0)
    meter.add("encode", 9.0)
    clock[0] += 10
    assert meter.shares() == {"decode": 0.2, "encode": 0.9}
    assert meter.text() == "waits for encode (decode 20%, encode 90%)"


def test_text_is_of_the_time_since_the_last_one(clock):
    meter = Meter({"decode": 1, "encode": 1})
    meter.add("decode", 10.0)
    clock[0] += 10
    meter.text()
    meter.add("encode", 4.0)
    clock[0] += 4
    assert meter.text() == "waits for encode (decode 0%, encode 100%)"
    assert meter.shares() == {"decode": pytest.approx(10 / 14), "encode": pytest.approx(4 / 14)}


def test_busy_counts_also_what_fails(clock):
    meter = Meter({"write": 1})
    with pytest.raises(OSError), meter.busy("write"):
        clock[0] += 3
        raise OSError
    clock[0] += 1
    assert meter.shares() == {"write": 0.75}


def test_never_more_than_all_the_time(clock):
    meter = Meter({"encode": 1})
    meter.add("encode", 5.0)  # a batch that began before this moment's window
    clock[0] += 1
    assert meter.shares() == {"encode": 1.0}


def test_threads_add_without_losing_any():
    meter = Meter({"decode": 8})

    def work():
        for _ in range(1000):
            meter.add("decode", 1.0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter._busy == {"decode": 8000.0}
