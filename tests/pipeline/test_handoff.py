"""A handoff keeps the order, waits when it is full, and neither side waits for one that is gone."""

import threading
import time

import pytest

from fastlatent.pipeline.handoff import Abandoned, Handoff


def use(handoff, seen):
    try:
        for thing in handoff:
            seen.append(thing)
    except Abandoned:
        seen.append("abandoned")


def started(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("depth", [1, 3])
def test_order(depth):
    handoff, seen = Handoff(depth), []
    thread = started(use, handoff, seen)
    assert all(handoff.put(i) for i in range(100))
    handoff.end()
    thread.join(5)
    assert seen == list(range(100))


def test_nothing_at_all():
    handoff = Handoff(1)
    handoff.end()
    assert list(handoff) == []


def test_a_full_one_waits():
    handoff = Handoff(2)
    done = []
    thread = started(lambda: done.extend(handoff.put(i) for i in range(3)))
    time.sleep(0.1)
    assert thread.is_alive()  # the third waits
    things = iter(handoff)
    assert next(things) == 0
    thread.join(5)
    assert done == [True] * 3


def test_abandoned_at_once():
    """What still waits is not used: the file that it would become is thrown away."""
    handoff, seen = Handoff(5), []
    handoff.put(1)
    handoff.put(2)
    handoff.abandon()
    use(handoff, seen)
    assert seen == ["abandoned"]


def test_a_user_that_gave_up_frees_the_maker():
    handoff, done = Handoff(1), []
    thread = started(lambda: done.extend(handoff.put(i) for i in range(3)))
    time.sleep(0.05)
    handoff.give_up()
    thread.join(5)
    assert done == [True, False, False]
