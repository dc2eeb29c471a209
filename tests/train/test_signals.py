# SPDX-License-Identifier: Apache-2.0
import signal
import threading
from contextlib import nullcontext

import pytest

from anabranch.errors import Stopped
from anabranch.train.signals import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_check_raises_with_exit_code_75(number):
    with StopFlag() as stop:
        stop.check("not yet")
        signal.raise_signal(number)
        with pytest.raises(Stopped, match=rf"clustering stopped \({number.name} received\)") as stopped:
            stop.check("clustering stopped")
    assert stopped.value.exit_code == 75


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag(), StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_an_inner_loop_stops_the_outer_ones_and_those_that_follow():
    with StopFlag() as outer:
        with StopFlag(), StopFlag() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.is_set
        assert outer.is_set
        with StopFlag() as next_loop:
            assert next_loop.is_set
    with StopFlag() as later:
        assert not later.is_set


def asked_in_a_thread():
    seen = []

    def loop():
        with StopFlag() as outer, StopFlag() as stop:
            seen.append((outer.is_set, stop.is_set))
            with pytest.raises(Stopped) if stop.is_set else nullcontext():
                stop.check("drawing stopped")

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    return seen


def test_outside_the_main_thread_it_is_set_as_the_main_one_is():
    assert asked_in_a_thread() == [(False, False)]
    with StopFlag():
        assert asked_in_a_thread() == [(False, False)]
        signal.raise_signal(signal.SIGTERM)
        assert asked_in_a_thread() == [(True, True)]
    assert asked_in_a_thread() == [(False, False)]


def test_a_second_signal_ends_the_process_at_once(start_worker):
    process = start_worker("stubborn_worker.py")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "first signal\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
