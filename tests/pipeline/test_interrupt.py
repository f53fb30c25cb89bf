import os
import signal
import subprocess
import sys
import threading

import pytest

from fastlatent.pipeline.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_at_check(number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.requested
        reached = True
        stop.check()
    assert reached
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping after this step; again: at once" in capfd.readouterr().err


def test_the_second_one_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)  # never reached
        pytest.fail("the second signal changed nothing")


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with pytest.raises(ValueError), StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise ValueError
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_one_inside_another():
    with StopRequest() as outer:
        with pytest.raises(KeyboardInterrupt), StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            inner.check()
        outer.check()  # it was the inner one's


def test_outside_the_main_thread_nothing_is_installed():
    # Encoding and sampling from a thread of a notebook or a server: Ctrl-C is that program's affair.
    errors = []

    def run():
        try:
            with StopRequest() as stop:
                stop.check()
        except BaseException as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_python_did_not_install_comes_back():
    # signal.signal returns None for one that C code installed, and does not take None back.
    code = """
import ctypes, signal
libc = ctypes.CDLL(None)
libc.signal.restype = ctypes.c_void_p
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)
libc.signal(signal.SIGTERM, ctypes.cast(handler, ctypes.c_void_p))
from fastlatent.pipeline.interrupt import StopRequest
with StopRequest():
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
