"""Waits that end: their own bound, the caller's signals, and a word after a while."""

import logging
import threading
import time

import pytest

from pipeline.core import deadline
from pipeline.core.deadline import within

log = logging.getLogger("rushes.test")


def test_the_answer_or_the_exception_of_the_call():
    assert within(5, lambda: 3, "x", log) == 3
    for kind in (KeyError, TimeoutError, SystemExit, GeneratorExit):

        def fail(kind=kind):
            raise kind("it")

        with pytest.raises(kind):
            within(5, fail, "x", log)


def test_a_call_that_hangs_ends_in_time_and_says_what_it_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(deadline, "TELL_AFTER_S", 0.3)
    started, over = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match="the thing: no answer within 0.6 s"):
        within(0.6, over.wait, "the thing", log)
    assert 0.5 < time.monotonic() - started < 2
    assert [record.getMessage()[:21] for record in caplog.records] == ["waiting for the thing"]
    over.set()


def test_the_caller_ends_the_wait():
    asked = time.monotonic() + 0.3

    def check():
        if time.monotonic() > asked:
            raise KeyboardInterrupt

    started, over = time.monotonic(), threading.Event()
    with pytest.raises(KeyboardInterrupt):
        within(60, over.wait, "x", log, check)
    assert time.monotonic() - started < 2
    over.set()
