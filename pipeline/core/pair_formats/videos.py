"""Clips: pairs by aspect (VideoReward's benchmark, arXiv 2501.13918) and ratings of single clips (VideoFeedback, arXiv
2406.15252)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import (
    TIE_WORDS,
    JudgedPair,
    LeftOut,
    PairFormat,
    Row,
    in_groups,
    pair_of,
    ranked,
    register,
)


@register("video-reward")
class VideoReward(PairFormat):
    """VideoGen-RewardBench: path_A, path_B, prompt; A, B or same under each of Overall, VQ, MQ and TA."""

    required = frozenset({"path_A", "path_B", "prompt", "Overall"})
    optional = frozenset({"VQ", "MQ", "TA"})
    checked = "the data set's card"
    aspects = ("Overall", "VQ", "MQ", "TA")

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        labels = {"a": 1, "b": -1, **dict.fromkeys(TIE_WORDS, 0)}
        for where, row in rows:
            word = str(row.get(self.aspect or "Overall")).strip().lower()
            if word not in labels:
                yield LeftOut("no label", where, f"found {word!r:.40}")
            else:
                yield pair_of(where, row["prompt"], row["path_A"], row["path_B"], labels[word])


@register("video-feedback")
class VideoFeedback(PairFormat):
    """VideoFeedback: ratings from 1 to 4 of clips, files ID.mp4; clips of one 'text prompt' that stand together."""

    aspects = (
        "mean", "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment",
        "factual consistency",
    )  # fmt: skip
    required = frozenset({"id", "text prompt", *aspects[1:]})
    checked = "the data set's card, but for the names of the files"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        chosen = self.aspects[1:] if self.aspect in (None, "mean") else (self.aspect,)
        for group in in_groups(rows, "text prompt"):
            where, first = group[0]
            if len(group) < 2:
                yield LeftOut("one clip of its prompt", where)
                continue
            ratings = [[row[name] for name in chosen] for _, row in group]
            numbers = [all(isinstance(value, int | float) for value in each) for each in ratings]
            scores = [sum(each) / len(each) if good else None for each, good in zip(ratings, numbers, strict=True)]
            yield from ranked(where, first["text prompt"], [f"{row['id']}.mp4" for _, row in group], scores)
