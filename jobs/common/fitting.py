"""From a table of labelled pairs to a fitted head, for `rushes fit-reward`."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.options import say
from jobs.common.pair_embeddings import Dropped, embed_pairs
from pipeline.core.errors import ConfigError
from pipeline.rewards.fitting.fit import EmbeddedPairs, Fit, fit
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.fitted_head import WEIGHTS, FittedConfig, FittedHead, load_head
from pipeline.rewards.scorers.fitted_clip import check_base, probe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a reward is fitted on: a CLIP, and the head of an earlier fit to which raters are added, or None."""

    clip: ClipEmbedder
    model: str  # a folder or a hub id
    known: FittedHead | None

    @property
    def users(self) -> list[str]:
        return [] if self.known is None else self.known.config.users


def load_base(base: str, heads: int, device: str, batch: int) -> Base:
    """`base`: a CLIP, or the folder of a fitted reward. Raises `ConfigError`, or what loading raises."""
    known = load_head(Path(base)) if (Path(base) / WEIGHTS).is_file() else None
    if known is not None and not known.config.users:
        raise ConfigError(f"--base {base}: was fitted to all raters alike; fit it again with --heads 2 or more")
    if known is not None and heads > 1:
        raise ConfigError(f"--heads {heads}: {base} has its {len(known.heads)} heads already; leave --heads out")
    model = base if known is None else known.config.base
    clip = ClipEmbedder(model, device=device, batch=batch)
    if known is not None:
        check_base(clip, known, model)
    return Base(clip=clip, model=os.path.abspath(model) if Path(model).exists() else model, known=known)


def fit_head(
    table: Path, base: Base, raters: Collection[str], heads: int, console: Console
) -> tuple[FittedHead, Fit, EmbeddedPairs, Dropped]:
    """Says what was dropped, and fits. Raises `InputError` or `ConfigError` where the answers do not allow it."""
    import torch

    embedded, dropped = embed_pairs(table, base.clip, raters, console)
    for line in dropped.lines():
        say(console, line)
    if heads > 1 and len(embedded.raters) < 2:
        raise ConfigError(f"--heads {heads}: the answers name {len(embedded.raters)} rater; leave --heads out")
    apart = heads > 1 or base.known is not None
    if apart and "" in embedded.raters:
        raise ConfigError(f"{table}: some answers name no rater; fill the column 'rater', or fit to all alike")
    if again := sorted(set(base.users) & set(embedded.raters)):
        raise ConfigError(f"--base: knows {again[0]!r:.60} already; choose others with --rater")
    with console.status("fitting"):
        fitted = fit(embedded, heads, known=None if base.known is None else base.known.heads)
    config = FittedConfig(
        base=base.model,
        width=base.clip.width,
        tie=fitted.eta,
        users=[*base.users, *embedded.raters] if apart else [],
    )
    mixtures = fitted.mixtures if base.known is None else torch.cat([base.known.mixtures, fitted.mixtures])
    head = FittedHead(config=config, heads=fitted.heads, mixtures=mixtures, probe=probe(base.clip))
    return head, fitted, embedded, dropped
