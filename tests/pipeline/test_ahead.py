import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastlatent.pipeline.ahead import ahead


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as made:
        yield made


def tasks(count):
    numbers = iter(range(count))
    return lambda: next(numbers, None)


def test_results_come_in_the_order_of_the_tasks(pool):
    first = threading.Event()

    def work(task):
        if task == 0:
            assert first.wait(10)  # others are done before it
        elif task == 2:
            first.set()
        return task * 10

    assert list(ahead(tasks(50), work, pool=pool, depth=4)) == [(i, 10 * i) for i in range(50)]


def test_no_task_at_all(pool):
    assert list(ahead(tasks(0), abs, pool=pool, depth=2)) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_are_begun_ahead(pool, depth):
    pulled = 0

    def pull():
        nonlocal pulled
        pulled += 1
        return pulled if pulled <= 20 else None

    for used, _ in enumerate(ahead(pull, abs, pool=pool, depth=depth), 1):
        assert pulled - used <= depth  # the one in use is no longer waiting


def test_who_has_nothing_at_the_moment_is_asked_again(pool):
    answers = iter([1, None, 2, None, None])
    assert list(ahead(lambda: next(answers), abs, pool=pool, depth=3)) == [(1, 1), (2, 2)]


def test_an_error_is_raised_at_its_turn_and_the_rest_is_not_begun(pool):
    begun = []

    def work(task):
        begun.append(task)
        if task == 2:
            raise OSError("gone")
        return task

    stream = ahead(tasks(1000), work, pool=pool, depth=4)
    assert [next(stream), next(stream)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="gone"):
        next(stream)
    assert len(begun) < 10


def test_leaving_early_cancels_what_waits():
    hold, begun = threading.Event(), []

    def work(task):
        begun.append(task)
        assert task == 0 or hold.wait(10)

    with ThreadPoolExecutor(1) as pool:
        stream = ahead(tasks(100), work, pool=pool, depth=8)
        next(stream)
        stream.close()
        hold.set()
    assert len(begun) <= 3  # the first, and what the thread had at that moment
