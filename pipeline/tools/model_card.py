"""The model card of an export (README.md): front matter, code that runs as pasted, and what the run's files say about
prompts, rewards and takes.

Paths of this machine are left out, but for a base that is a local folder, which the code must name.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.schema import Config
from pipeline.core.files import atomic_write
from pipeline.core.reading import read_json_object
from pipeline.core.safe_paths import file_inside
from pipeline.core.secrets import mask, mask_tree
from pipeline.core.statistics import Estimate, with_error
from pipeline.core.takes_table import read_takes
from pipeline.generators.checkpoint_files import is_local, styled_files
from pipeline.generators.export_folder import copy_line, load_lines
from pipeline.rl.evaluation import changes
from pipeline.rl.objectives import objective_of
from pipeline.tools.report import facts
from pipeline.tools.report.record import COPY_IT, RunRecord, read_run
from pipeline.tools.report.takes import step_folders

SHOWN = 4  # prompts with takes before and after
_CONDITIONED = re.compile(r"ImageToVideo|ImageToImage|Img2Img|Edit|Kontext|Pix2Pix|Inpaint|I2V|VideoToVideo")


def write_card(run: Path, folder: Path, cfg: Config, step: int, summary: dict[str, Any] | None = None) -> Path:
    """Writes `folder/README.md` with its pictures in `folder/card/`, and returns its path.

    `run`: the run's folder; a part whose file is missing there is left out. `summary`: instead of summary.json, of a
    run that is about to write it. Raises InputError for broken files.
    """
    record = read_run(run)
    if summary is not None:
        record = replace(record, summary=summary)
    media = folder / "card"
    shutil.rmtree(media, ignore_errors=True)
    media.mkdir()
    ends = _ends(record, step)
    parts = [
        _front_matter(folder, cfg),
        f"# {run.resolve().name}\n\n{_summary(cfg, record, step)}",
        f"## Use\n\n{_use(folder, cfg, _example_prompt(ends))}\n",
        _results(cfg, ends),
        _curve(record, step, media),
        _takes(ends, media),
        _training(cfg, record),
    ]
    if not any(media.iterdir()):
        media.rmdir()
    card = folder / "README.md"
    atomic_write(card, mask("\n".join(part for part in parts if part)).encode())
    return card


def _use(folder: Path, cfg: Config, prompt: str) -> str:
    if styled_files(folder):
        line = copy_line(folder)
        return f"{line[0].upper()}{line[1:]}."
    return f"```python\n{usage(folder, cfg, prompt)}```"


def usage(folder: Path, cfg: Config, prompt: str) -> str:
    """Lines of Python that load the export and sample one take, to be run in its folder."""
    generator, lines = cfg.generator, load_lines(folder)
    video = generator.num_frames > 1
    full = (folder / "model_index.json").exists()
    own = "DiffusionPipeline" if generator.pipeline is None else generator.pipeline
    arguments: dict[str, Any] = {"height": generator.height, "width": generator.width}
    if video:
        arguments["num_frames"] = generator.num_frames
    arguments["num_inference_steps"] = cfg.evaluation.steps
    true_cfg = "QwenImage" in _pipeline_name(folder, cfg)  # its guidance_scale is an input of distilled models
    arguments["true_cfg_scale" if true_cfg else "guidance_scale"] = generator.guidance_scale
    arguments.update(mask_tree(generator.call_kwargs))
    conditioned = bool(_CONDITIONED.search(_pipeline_name(folder, cfg)))
    helpers = [name for name, needed in (("export_to_gif", video), ("load_image", conditioned)) if needed]
    base = "." if full else generator.pretrained
    revision = f", revision={generator.revision!r}" if generator.revision and not full else ""
    text = ["import torch", f"from diffusers import {own}"]
    text += [f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []
    text += ["from peft import PeftModel"] if any("PeftModel" in line for line in lines) else []
    dtype = "float16" if generator.dtype == "float16" else "bfloat16"
    text += ["", f'device, dtype = ("cuda", torch.{dtype}) if torch.cuda.is_available() else ("cpu", torch.float32)']
    text += [f"pipe = {own}.from_pretrained({base!r}{revision}, dtype=dtype)", *lines, "pipe = pipe.to(device)"]
    text += ['picture = load_image("picture.png")  # yours'] if conditioned else []
    text += ["take = pipe(", f"    prompt={prompt!r},"]
    text += ["    image=picture,"] if conditioned else []
    text += [f"    {name}={value!r}," for name, value in arguments.items()]
    text += ['    output_type="pil",', "    generator=torch.Generator().manual_seed(0),"]
    if video:
        return "\n".join([*text, ").frames[0]", f'export_to_gif(take, "take.gif", fps={generator.fps:g})', ""])
    return "\n".join([*text, ").images[0]", 'take.save("take.png")', ""])


def _pipeline_name(folder: Path, cfg: Config) -> str:
    """The pipeline's class, where it is known without the hub."""
    for index in (folder / "model_index.json", Path(cfg.generator.pretrained).expanduser() / "model_index.json"):
        if cfg.generator.pipeline is None and index.is_file():
            return str(read_json_object(index, "copy the checkpoint again", lenient=True).get("_class_name"))
    return cfg.generator.pipeline or ""


def _front_matter(folder: Path, cfg: Config) -> str:
    base = cfg.generator.pretrained
    source = "image" if _CONDITIONED.search(_pipeline_name(folder, cfg)) else "text"
    task = f"{source}-to-{'video' if cfg.generator.num_frames > 1 else 'image'}"
    lora = not (folder / "model_index.json").exists()
    tags = ["rushes", "reinforcement-learning", cfg.objective.name, "diffusers", task]
    matter: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": tags + (["lora"] if lora else []),
    }
    if not is_local(base):
        matter["base_model"] = base
        matter["base_model_relation"] = "adapter" if lora else "finetune"
    if licence := licence_of_folder(Path(base).expanduser()):
        matter["license"] = licence
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n"


def licence_of_folder(base: Path) -> str | None:
    """`license` in the front matter of a local checkpoint's card; None where there is none."""
    card = base / "README.md"
    if not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    stated = re.search(r"^license:\s*([\w.-]+)\s*$", found[1], re.MULTILINE) if found else None
    return stated[1] if stated else None


def _summary(cfg: Config, record: RunRecord, step: int) -> str:
    base = cfg.generator.pretrained
    name = f"[{base}](https://huggingface.co/{base})" if not is_local(base) else f"`{Path(base).name}`"
    takes = f", {record.summary['takes']:,} takes" if record.summary.get("takes") else ""
    per_step = f"{cfg.step.groups} × {cfg.step.takes} takes a step{takes}"
    return (
        f"{name} after {step} step{'s' if step != 1 else ''} of reinforcement learning with Rushes "
        f"({cfg.trainable.description}; objective {cfg.objective.name}; {per_step}). The licence of the base model "
        "applies.\n"
    )


# ------------------------------------------------------------------------------------------------ the results


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """The first evaluation of a run, and the one at the exported step or the last before it."""

    steps: tuple[int, int]
    records: tuple[dict[str, Any], dict[str, Any]]  # lines of evals.jsonl
    folders: tuple[Path | None, Path | None]  # of the takes
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]  # of takes.parquet


def _ends(record: RunRecord, step: int) -> _Ends | None:
    rows = [row for row in record.evals if row["step"] <= step]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    by_step = dict(step_folders(record.folder.path / "eval"))
    folders = (by_step.get(first["step"]), by_step.get(last["step"]))
    for folder in folders:
        if folder is not None:
            inside = f"{folder.relative_to(record.folder.path)}/takes.parquet"
            file_inside(record.folder.path, inside, str(record.folder.path), COPY_IT)
    tables = tuple(read_takes(folder) if folder else [] for folder in folders)
    return _Ends(
        steps=(first["step"], last["step"]), records=(first, last), folders=folders, rows=(tables[0], tables[1])
    )


def _example_prompt(ends: _Ends | None) -> str:
    rows = ends.rows[1] if ends else []
    return str(rows[0]["prompt"]) if rows else "a photo"


def _results(cfg: Config, ends: _Ends | None) -> str:
    if ends is None or ends.steps[0] == ends.steps[1]:
        return ""
    before, after = ends.records
    lines = [
        "## Results\n",
        f"Held-out prompts ({after.get('n', 0)}), the same seeds before and after; ± is the standard error over "
        "prompts, of the difference that of the paired differences. A reward measures what its scorer sees, not "
        "quality as such.\n",
        "| reward | weight | before | after | difference |",
        "|---|---|---|---|---|",
    ]
    changed = changes(before, after)
    weights = {name: reward.weight for name, reward in cfg.rewards.items()}
    for name, weight in weights.items():
        first, last = ((record.get("rewards") or {}).get(name) for record in ends.records)
        if first and last:
            named = f"{name} ({_scorer(cfg, name)}) | {weight:g}"
            change = _pm_change(first, last, changed.rewards.get(name))
            lines.append(f"| {named} | {_pm(first)} | {_pm(last)} | {change} |")
    if len(weights) > 1:
        change = _pm_change(before, after, changed.reward)
        lines.append(f"| weighted sum | | {_pm(before)} | {_pm(after)} | {change} |")
    if verdict := after.get("verdict"):
        lines.append(f"\nVerdict of the last evaluation: {cell_text(verdict['text'])}.")
    return "\n".join(lines) + "\n"


def _scorer(cfg: Config, name: str) -> str:
    scorer = cfg.rewards[name].scorer
    file, colon, function = scorer.rpartition(":")
    return f"{Path(file).name}:{function}" if colon else scorer


def _pm(record: dict[str, Any]) -> str:
    return with_error(record["mean"], record.get("se"), digits=3)


def _pm_change(before: dict[str, Any], after: dict[str, Any], paired: Estimate | None) -> str:
    mean = paired.mean if paired else after["mean"] - before["mean"]
    return with_error(mean, paired.se if paired else None, digits=3, sign="+")


def _key(row: dict[str, Any]) -> tuple[int, int]:
    return row["prompt_index"], row["seed"]


def _curve(record: RunRecord, step: int, media: Path) -> str:
    """The reward of training steps and of evaluations, as card/reward.png."""
    training = [
        (row["step"], row["reward/mean"]) for row in record.metrics if row["step"] < step and "reward/mean" in row
    ]
    evals = [row for row in record.evals if row["step"] <= step]
    if len(training) < 2 and len(evals) < 2:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if training:
        axes.plot([x for x, _ in training], [y for _, y in training], color="0.6", label="training takes")
    errors = [row.get("se") or 0.0 for row in evals]
    axes.errorbar([row["step"] for row in evals], [row["mean"] for row in evals], errors, marker="o", label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("reward (weighted sum)")
    axes.legend(frameon=False)
    figure.savefig(media / "reward.png")
    return "![Reward over the training steps](card/reward.png)\n"


def _takes(ends: _Ends | None, media: Path) -> str:
    if ends is None or ends.steps[0] == ends.steps[1]:
        return ""
    before, after = ({_key(row): row for row in rows if row.get("path")} for rows in ends.rows)
    keys: dict[int, tuple[int, int]] = {}
    for key in sorted(before.keys() & after.keys()):
        keys.setdefault(key[0], key)  # one take a prompt
    lines = [f"## Takes\n\n| prompt | before | step {ends.steps[1]} |", "|---|---|---|"]
    for key in list(keys.values())[:SHOWN]:
        cells = []
        for side, rows, folder in zip(("before", "after"), (before, after), ends.folders, strict=True):
            assert folder is not None
            source = file_inside(folder, rows[key]["path"], f"{folder / 'takes.parquet'}: path", COPY_IT)
            copy = media / f"prompt-{key[0]:05d}-{side}{source.suffix}"
            shutil.copyfile(source, copy)
            path = f"card/{copy.name}"
            video = copy.suffix == ".mp4"
            cells.append(f'<video src="{path}" autoplay loop muted></video>' if video else f"![{side}]({path})")
        lines.append(f"| {cell_text(after[key]['prompt'])} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def cell_text(text: str) -> str:
    """A text that is no markup in a table's cell."""
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _training(cfg: Config, record: RunRecord) -> str:
    sampler = f"{cfg.sampler.kind}, noise level {cfg.sampler.noise_level:g}"
    if not objective_of(cfg).requirements.draws_noise:
        sampler = "ODE"
    rows = [
        (
            "prompts",
            f"{cfg.prompts.train.name}; held-out: {cfg.prompts.heldout.name if cfg.prompts.heldout else 'none'}",
        ),
        ("sampler in training", f"{sampler}, {cfg.sampler.steps} steps"),
        ("optimizer", f"lr {cfg.optimizer.lr:g}, EMA {cfg.optimizer.ema_decay:g}"),
        ("seed", str(cfg.run.seed)),
    ]
    if isinstance(record.summary.get("wall_s"), (int, float)):
        rows.append(("duration", facts.duration(record.summary["wall_s"])))
    versions = record.summary.get("versions") or {}
    if isinstance(versions, dict) and versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    table = "\n".join(f"| {name} | {cell_text(value)} |" for name, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"
