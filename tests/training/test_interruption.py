"""Signals: the first is answered, the second obeyed at once; under nohup a closed terminal does not matter."""

import gc
import os
import signal
import threading
import time

import pytest

from deepseek_jax.parallel import watch
from deepseek_jax.training.interruption import STOPPING, Abort, Interrupted, Interruption
from tests.support.patience import SECONDS, wait_for


@pytest.fixture(autouse=True)
def no_garbage():
    """An exception that a handler raises while garbage is collected reaches nobody: the process is ended instead."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def ends(monkeypatch):
    """Return the exit codes with which the process would have been ended, instead of being ended."""
    codes = []
    monkeypatch.setattr(watch, "end", codes.append)
    monkeypatch.setattr(watch, "end_soon", lambda code: None)  # its thread outlives a test
    return codes


def test_there_are_four():
    assert {number.name for number in STOPPING} == {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"}


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks_the_loop_and_the_second_ends_the_process(ends, number, capfd):
    before = [signal.getsignal(each) for each in STOPPING]
    with Interruption() as interruption:
        assert not interruption.requested(1)
        os.kill(os.getpid(), number)
        assert interruption.requested(2) and interruption.signal == number
        assert not ends
        os.kill(os.getpid(), number)
        wait_for(lambda: ends)
    assert ends == [128 + number]
    assert [signal.getsignal(each) for each in STOPPING] == before
    told = capfd.readouterr()
    assert f"{number.name}: finishing the step and saving" in told.out and "stopped at once" in told.err


def test_the_second_signal_is_obeyed_while_the_main_thread_waits(ends):
    """The signals reach another thread, and the main thread waits for it: no handler of Python has run."""

    def signal_twice():
        for _ in range(2):
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with Interruption():
        helper = threading.Thread(target=signal_twice)
        helper.start()
        helper.join()
        wait_for(lambda: ends)
    assert ends == [128 + signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_only_sighup_stays_ignored(ends, number):
    """nohup ignores SIGHUP. A script's background jobs ignore SIGINT, which would leave no way to ask them."""
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.requested(1) == (number == signal.SIGINT)
    finally:
        signal.signal(number, former)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING)
def test_outside_of_the_loop_a_signal_ends_the_program_with_one_line(monkeypatch, capfd, number):
    planned = []
    monkeypatch.setattr(watch, "end_soon", planned.append)
    with pytest.raises(SystemExit) as caught, Abort("nothing was lost"):
        os.kill(os.getpid(), number)
        time.sleep(SECONDS)
    assert caught.value.code == 128 + number
    assert capfd.readouterr().err == f"\n{number.name}: nothing was lost\n"
    assert planned == [128 + number]  # in case that the main thread does not come to it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_callback_that_swallows_exceptions_ends_the_process(ends):
    """JAX has one, which the garbage collector calls."""

    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with Abort("nothing was lost"):
        value = Deleted()
        del value
        wait_for(lambda: ends)
    assert ends == [128 + signal.SIGTERM]


def test_the_loop_has_its_own_answer_inside_of_a_command(ends):
    with pytest.raises(SystemExit), Abort("nothing was lost"):
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS)


def test_the_error_of_an_interruption_is_ctrl_c_for_others():
    assert issubclass(Interrupted, KeyboardInterrupt) and Interrupted(signal.SIGUSR1).signal is signal.SIGUSR1
