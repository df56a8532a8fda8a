"""An actor that computes for long and one that is stopped are told apart."""

import pytest

from actors.heartbeat import Pulse


def test_silence_is_counted_from_the_last_new_beat():
    now, beats = [0.0], {"a": None, "b": None}
    pulse = Pulse(lambda actor: beats[actor], lambda: now[0])
    for moment, beat, silent in ((0, None, 0), (500, None, 0), (510, "0", 0), (515, "1", 0), (530, "1", 15)):
        now[0], beats["a"] = moment, beat
        assert pulse.silent_s("a") == silent, moment
    assert pulse.silent_s("b") == 0
    now[0], beats["a"] = 620, "1"
    assert pulse.silent_s("a") == 105
    beats["a"] = "2"
    assert pulse.silent_s("a") == 0


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionError, TimeoutError])
def test_a_head_that_is_away_says_nothing_about_the_actor(kind):
    now, failing = [0.0], [False]

    def read(actor):
        if failing[0]:
            raise kind
        return "1"

    pulse = Pulse(read, lambda: now[0])
    assert pulse.silent_s("a") == 0
    now[0], failing[0] = 100, True
    assert pulse.silent_s("a") == 0
    now[0], failing[0] = 200, False
    assert pulse.silent_s("a") == 0
    now[0] = 230
    assert pulse.silent_s("a") == 30
