"""Signals by name (`signal.name`): each file here registers one, and nothing else knows its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.signals.base import Signal, SignalResult, SignalState

if TYPE_CHECKING:
    from pipeline.config.schema import Config

__all__ = ["Signal", "SignalResult", "SignalState", "signal_of"]


def signal_of(cfg: Config) -> Signal:
    """The signal that a config chooses, with its options."""
    assert isinstance(cfg.signal, Signal)
    return cfg.signal
