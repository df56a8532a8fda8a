"""Trained weights by path: a run, one of its checkpoints, or an export, applied to a policy.

`generate`, `evaluate` and `export` take the same kinds of path:

    runs/NAME                          newest complete checkpoint of a run (its EMA, if it keeps one)
    runs/NAME/checkpoints/step-000050  one checkpoint
    s3://bucket/runs/NAME              any of these in the store that `run.dir` names
    runs/NAME/export                   a LoRA (pytorch_lora_weights.safetensors) or a whole diffusers folder
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.load import load_run_config
from pipeline.config.schema import Config
from pipeline.core.errors import CheckpointError, ConfigError, InputError, one_line
from pipeline.core.files import nearest
from pipeline.generators.checkpoint_files import LORA_FILE, check_diffusers_folder, check_lora, lora_files, styled_files
from pipeline.runs.remote_sync import local_run

if TYPE_CHECKING:
    from pipeline.generators.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a path turned out to be. `config` is the run's own, for checkpoints."""

    label: str
    kind: Literal["checkpoint", "lora", "full"]
    path: Path
    config: Config | None = None
    step: int | None = None

    @property
    def run_config(self) -> Config:
        """The config of the run that made this checkpoint. Raises `InputError` for an export, which has none."""
        if self.config is None:
            raise InputError(f"{self.path}: is an export, which does not know its run; give the run's folder")
        return self.config


def find_trained(path: Path, step: int | None = None) -> Trained:
    """Looks at files only, loads nothing. Raises `InputError` or `CheckpointError`."""
    from pipeline.runs import checkpoint

    path = local_run(path)
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        hit = nearest(path.name, siblings)
        raise InputError(
            f"{path}: no such folder{f'; did you mean {path.parent / hit}?' if hit else ''}; give a "
            "run, a checkpoint or an export"
        )
    adapters = [] if (path / "model_index.json").exists() else lora_files(path)
    if adapters:
        check_lora(adapters)
        return Trained(label=str(path), kind="lora", path=path)
    if (path / "model_index.json").exists():
        check_diffusers_folder(path)
        return Trained(label=str(path), kind="full", path=path)
    if styled := styled_files(path):
        raise InputError(
            f"{styled[0]}: is in the key style of other programs; export it in the format lora to sample or evaluate it"
        )
    if (path / checkpoint.STATE).exists() or (path / checkpoint.MANIFEST).exists():
        run = path.parent.parent
    elif (path / "config.yaml").exists():
        run, path = path, _checkpoint_of(path, step)
    else:
        raise InputError(
            f"{path}: is neither a run (config.yaml), a checkpoint ({checkpoint.MANIFEST}) nor an "
            f"export ({LORA_FILE} or model_index.json)"
        )
    checkpoint.verify(path)
    if not (run / "config.yaml").exists():
        raise InputError(
            f"{run / 'config.yaml'}: is missing, so it is unknown what {path.name} trained; restore "
            "it from a copy of the run"
        )
    return Trained(
        label=str(path),
        kind="checkpoint",
        path=path,
        config=load_run_config(run),
        step=checkpoint.step_of(path),
    )


def _checkpoint_of(run: Path, step: int | None) -> Path:
    from pipeline.runs import checkpoint

    folders = checkpoint.complete(run / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run}: has no complete checkpoint yet; let it train on, or set checkpoint.every lower")
    if step is None:
        return checkpoint.latest(run / "checkpoints") or folders[0]
    steps = {checkpoint.step_of(folder): folder for folder in folders}
    if step not in steps:
        raise CheckpointError(
            f"{run}: has no checkpoint of step {step}; there are {', '.join(map(str, sorted(steps)))}"
        )
    return steps[step]


def load_policy(cfg: Config, trained: Trained | None, ema: bool = True) -> Policy:
    """The generator of `cfg`, with the trained weights in place. Raises `RushesError` kinds."""
    from pipeline.generators.policy import Policy
    from pipeline.runs.trained_weights import read_weights

    update: dict[str, Any] = {}
    if trained and trained.kind == "full":
        update["generator"] = cfg.generator.model_copy(update={"pretrained": str(trained.path), "revision": None})
    if trained and trained.kind == "checkpoint":
        base = trained.run_config.generator.pretrained
        if _same_folder(base, cfg.generator.pretrained) is False:
            raise ConfigError(
                f"{trained.label}: was trained on {base}, but the config's generator.pretrained is "
                f"{cfg.generator.pretrained}; "
                f"use generator.pretrained={base}"
            )
        update["trainable"] = trained.run_config.trainable
    text = update.get("trainable", cfg.trainable).trains_text
    if trained and (trained.kind == "lora" or text):  # its text encoders may not be those of the cached embeddings
        update["generator"] = cfg.generator.model_copy(update={"embedding_cache": None})
    cfg = cfg.model_copy(update=update)
    policy = Policy.load(cfg, cfg.rollout.device, cfg.rollout.threads)
    if trained and trained.kind == "checkpoint":
        policy.add_adapters()
        policy.load_weights(read_weights(trained.path, trained.run_config.trainable.kind, ema))
    if trained and trained.kind == "lora":
        from pipeline.generators.export import load_lora

        try:
            load_lora(policy.pipe, trained.path)
        except Exception as error:  # diffusers and peft raise many kinds for a LoRA of another model
            raise InputError(
                f"{trained.path / LORA_FILE}: does not fit {cfg.generator.pretrained} ({one_line(error, 160)}); "
                "give the generator it was trained on"
            ) from error
    return policy


def _same_folder(a: str, b: str) -> bool:
    return a == b or (Path(a).exists() and Path(b).exists() and Path(a).resolve() == Path(b).resolve())
