"""What `rushes fit-reward` says of a fitted reward: held-out agreement, calibration, and its card."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from jobs.common.agreement import compared
from jobs.common.pair_embeddings import Dropped
from jobs.common.rater_statistics import share_text
from pipeline.core.preference_statistics import hits, proportion, reliability
from pipeline.rewards.fitting.fit import EmbeddedPairs, Fit
from pipeline.rewards.fitting.likelihood import log_likelihood
from pipeline.tools.model_card import cell_text

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.rewards.models.fitted_head import FittedConfig


def summarise_fit(pairs: EmbeddedPairs, fitted: Fit, dropped: Dropped) -> dict[str, Any]:
    """JSON-able; everything about agreement is of pairs whose prompt's labels the head had not seen."""
    decided = pairs.label != 0
    label, prompts, difference = pairs.label[decided], pairs.prompt[decided], fitted.difference[decided]
    answers = _log_likelihoods(fitted)
    better, worse = answers[:2, decided]
    log_loss, error, bins = reliability(expit(better - worse), label)
    report: dict[str, Any] = {
        "pairs": len(pairs.label),
        "prompts": len(np.unique(pairs.prompt)),
        "takes": len(pairs.images),
        "ties": int((~decided).sum()),
        "raters": len(pairs.raters),
        "dropped": dropped.counts,
        "steps": fitted.steps,
        "accuracy": asdict(proportion(hits(difference, label), prompts)),
        "base_accuracy": asdict(proportion(hits(fitted.base[decided], label), prompts)),
        "against_base": compared(difference, fitted.base[decided], label, prompts),
        "with_ties": None,
        "log_loss": log_loss,
        "calibration_error": error,
        "bins": bins,
        "by_rater": {
            rater: asdict(proportion(hits(difference[mine], label[mine]), prompts[mine]))
            for index, rater in enumerate(pairs.raters)
            if (mine := pairs.rater[decided] == index).any()
        },
    }
    if not decided.all():
        likeliest = np.array(_ANSWERS)[answers.argmax(0)]
        report["with_ties"] = asdict(proportion((likeliest == pairs.label).astype(np.float64), pairs.prompt))
    return report


_ANSWERS = (1, -1, 0)  # labels: a is better, b is, tie


def _log_likelihoods(fitted: Fit) -> np.ndarray:
    """Of each of `_ANSWERS`, float64 [3, N]."""
    import torch

    difference, threshold = (
        torch.from_numpy(np.asarray(x, np.float64)) for x in (fitted.difference, fitted.thresholds)
    )
    answers = [log_likelihood(difference, torch.full_like(difference, label), threshold) for label in _ANSWERS]
    return torch.stack(answers).numpy()


def fit_lines(report: dict[str, Any]) -> list[str]:
    """For the console and the card."""
    gain = report["against_base"]
    lines = [
        f"{report['pairs']} answers about {report['takes']} takes of {report['prompts']} prompts, "
        f"{report['ties']} of them ties; {report['raters']} rater(s)",
        f"agrees with held-out answers: {share_text(report['accuracy'])}; its CLIP alone: "
        f"{share_text(report['base_accuracy'])}"
        + (f"; difference {100 * gain['mean']:+.1f} ± {100 * gain['ci95']:.1f}" if gain else ""),
    ]
    if report["with_ties"] is not None:
        lines.append(f"with ties, three answers: {share_text(report['with_ties'])}")
    lines.append(
        f"log loss {report['log_loss']:.3f} (0.693 is knowing nothing), calibration error "
        f"{report['calibration_error']:.3f}"
    )
    return lines


def print_fit(report: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    for line in fit_lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    if len(report["by_rater"]) > 1:
        raters = Table("rater", "agrees with held-out answers")
        for rater, share in report["by_rater"].items():
            raters.add_row(_plain(rater or "–"), share_text(share))
        console.print(raters)
    table = Table()
    for title in ("how sure it was", "how often right", "answers"):
        table.add_column(title, justify="right")
    for row in report["bins"]:
        table.add_row(f"{100 * row['confidence']:.0f} %", f"{100 * row['accuracy']:.0f} %", str(row["n"]))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def card(report: dict[str, Any], config: FittedConfig, digest: str, folder: str, source: str) -> str:
    """README.md of the folder."""
    rows = [
        f"| {100 * row['confidence']:.0f} % | {100 * row['accuracy']:.0f} % | {row['n']} |" for row in report["bins"]
    ]
    users = "\n".join(f"* {cell_text(user)}" for user in config.users)
    return f"""# A reward fitted to people's judgements

A linear head on the embeddings of the CLIP `{config.base}`: the cosine of picture and prompt, their product in each
dimension, and the picture's own embedding. Written by `rushes fit-reward {source}`; digest `{digest}`.

```yaml
rewards:
  preference: {{scorer: fitted_clip, args: {{path: {folder}, digest: {digest}}}}}
```

A difference of 1 in score means odds of e to 1 that people prefer the higher one. It knows the kind of takes that it
was fitted on; what a model learns against it should be watched with other rewards and by people.

## What it was fitted on, and how well it does

{chr(10).join(f"* {line}" for line in fit_lines(report))}

Every pair was judged by a head that was fitted without any label of its prompt; the head here was fitted on all of
them. Intervals are 95 %, prompts the units. Ties: Rao and Kupper's model, eta = {config.tie:.3f}.

| how sure it was | how often right | answers |
|---|---|---|
{chr(10).join(rows)}
""" + (
        f"\n## Users\n\n`args: {{user: NAME}}` scores as that rater would; without it, the mean.\n\n{users}\n"
        if users
        else ""
    )
