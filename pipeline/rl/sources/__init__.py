"""Sources by name (`source.name`): each file here registers one, and nothing else knows its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.sources.base import Source

if TYPE_CHECKING:
    from pipeline.config.schema import Config

__all__ = ["Source", "source_of"]


def source_of(cfg: Config) -> Source:
    """The source that a config chooses, with its options."""
    assert isinstance(cfg.source, Source)
    return cfg.source
