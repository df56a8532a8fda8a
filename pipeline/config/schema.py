"""The config of a run: sections, defaults, rules of consistency, and one sentence per key.

The larger sections are in `pipeline.config.sections`. A config is a YAML file plus `key=value` overrides
(`pipeline.config.load`); docs/config.md is generated from the sentences (`pipeline.config.reference`). A rule about one
section is a validator of that section; rules between sections are the validators of `Config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, PlainSerializer, SerializeAsAny, field_validator, model_validator

from pipeline.config.parts import Part, chosen_from
from pipeline.config.resources import HalfCpu, WorkerCount, WorkerRange
from pipeline.config.sections.base import Count, DecayRate, Natural, NonNegative, Positive, Section
from pipeline.config.sections.evaluation import EvaluationConfig
from pipeline.config.sections.generator import GeneratorConfig, TrainableConfig
from pipeline.config.sections.rewards import RewardConfig
from pipeline.config.sections.sampler import SamplerConfig
from pipeline.core.reading import shown
from pipeline.core.storage import display_path, local_folder

# A URL is replaced by its scratch folder (pipeline.core.storage) and written back as the URL.
RunsFolder = Annotated[Path, BeforeValidator(local_folder), PlainSerializer(display_path, return_type=str)]


class RunConfig(Section):
    """The run itself."""

    name: str | None = Field(
        None, description="Name of the run and of its folder; default: name of the config file and start time."
    )
    dir: RunsFolder = Field(
        Path("runs"), description="Folder of all runs, or a URL (s3://, gs://, file://) that they are mirrored to."
    )
    seed: Natural = Field(
        0, description="Seed of the prompt order, the takes, the windows and the LoRA initialisation."
    )
    steps: Count = Field(100, description="Optimisation steps (one step: rollout, scoring, learning).")


class PromptsConfig(Section):
    """The prompt sets."""

    train: Path = Field(
        description="Training prompts: .txt (one per line), .jsonl, .parquet or a folder of captioned clips."
    )
    heldout: Path | None = Field(None, description="Evaluation prompts, never trained on.")


class StepConfig(Section):
    """How large an optimisation step is."""

    groups: Count = Field(8, description="Groups per optimisation step.")
    takes: Count = Field(8, description="Takes per group (K): of one prompt.")
    updates: Count = Field(1, description="Optimiser updates per step; all but the first are off-policy.")
    max_staleness: Natural = Field(
        0, description="Largest learner version minus policy version at consumption (0: strictly on-policy)."
    )

    @model_validator(mode="after")
    def _a_group_for_each_update(self) -> StepConfig:
        if self.updates > self.groups:
            raise ValueError(
                f"step.updates: {self.updates} exceeds step.groups ({self.groups}); each update needs at least one "
                "whole group"
            )
        return self


class OptimizerConfig(Section):
    """AdamW, warm-up, gradient clipping and EMA."""

    lr: Positive = Field(1e-4, description="AdamW learning rate.")
    betas: Annotated[list[DecayRate], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW betas: decay rates of the first and the second moment."
    )
    eps: Positive = Field(1e-8, description="AdamW epsilon.")
    weight_decay: NonNegative = Field(1e-4, description="AdamW weight decay.")
    warmup_steps: Natural = Field(0, description="Updates of linear warm-up.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    ema_decay: DecayRate = Field(
        0.0, description="EMA of the trained weights, used for evaluation and export (0: no EMA)."
    )


class LearnerConfig(Section):
    """The learner's processes."""

    ranks: Count = Field(
        1, description="Learner processes, one per GPU: weights are sharded over them (FSDP2), and each trains a share."
    )
    context_parallel: Count = Field(
        1, description="Ranks that split one take's sequence (long videos); must divide learner.ranks."
    )
    replicas: Count = Field(
        1,
        description="Groups trained side by side on a CPU, each by a thread on the same weights: for small models, "
        "which gain nothing from more `threads`.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    micro_batch: Natural = Field(
        0,
        description="Takes per forward pass; 0: the whole group at one trained step; more than the group size: "
        "several trained steps of a group at once, faster for small models, equal up to rounding.",
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field(
        "none", description="Autocast of the denoiser; weights, latents and log-probs stay float32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    resources: HalfCpu = Field({"CPU": 0.5}, description="Ray resources reserved per rank: CPU, GPU, memory, custom.")
    threads: Natural = Field(
        0, description="Compute threads per rank, and of each of its replicas; 0: all cores, shared by a node's ranks."
    )

    @model_validator(mode="after")
    def _ranks_or_replicas(self) -> LearnerConfig:
        if self.ranks > 1 and self.replicas > 1:
            raise ValueError(
                f"learner.replicas: {self.replicas} replicas share one process, not learner.ranks {self.ranks}; set "
                "one of them to 1"
            )
        if self.ranks % self.context_parallel:
            raise ValueError(
                f"learner.context_parallel: {self.context_parallel} does not divide learner.ranks ({self.ranks})"
            )
        return self


class RolloutConfig(Section):
    """The rollout workers."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    workers: WorkerCount = Field(
        WorkerRange(1, 1), description="Rollout workers: a number, or a range within which the pool autoscales."
    )
    batch: Natural = Field(
        0,
        description="Takes per pipeline call; 0: the whole group; twice the group size or more: several groups of a "
        "step at once, faster for small models, equal up to rounding.",
    )
    merge_lora: bool = Field(
        False, description="Merge the LoRA into the weights for sampling (faster, equal up to rounding)."
    )
    resources: HalfCpu = Field(
        {"CPU": 0.5}, description="Ray resources reserved per worker: CPU, GPU, memory, custom ones."
    )
    threads: Natural = Field(0, description="Compute threads per worker; 0: cores / workers.")

    @property
    def queue_capacity(self) -> int:
        """Items that each queue between the roles may hold. With fewer than one per worker, workers that finish at the
        same time would wait for room in it."""
        return max(8, self.workers.max)


class FaultsConfig(Section):
    """How many failures a run survives."""

    max_attempts: Count = Field(3, description="Attempts per rollout and per scoring of a group, before it has failed.")
    max_failed_groups: Natural = Field(3, description="The run fails after more failed groups in a row than this.")
    max_restarts: Natural = Field(
        2,
        description="The run fails after more restarts than this: of a worker that does not start, or of the learner "
        "or the controller without a new step in between.",
    )
    call_timeout_s: Positive = Field(
        1800.0,
        description="Time limit of a rollout or scoring call (loading weights included), in seconds; then the worker "
        "is replaced and its groups are tried again.",
    )


class CheckpointConfig(Section):
    """When checkpoints are saved and deleted."""

    every: Natural = Field(25, description="Save every N steps (0: only at the end and when stopped).")
    keep: Count = Field(2, description="Checkpoints kept; older ones are deleted.")


class TrackingConfig(Section):
    """Where metrics and takes go."""

    backends: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"], description="Trackers besides metrics.jsonl."
    )
    save_takes_every: Natural = Field(0, description="Save the training takes of every N-th step as files (0: none).")


class RayConfig(Section):
    """The Ray that a run joins or starts."""

    address: str | None = Field(
        None, description="Ray address; default: a running cluster, or else a Ray that the run starts on this machine."
    )
    init: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of `ray.init` for a Ray that the run starts, such as num_cpus (default: all cores), "
        "object_store_memory (bytes; default: 512 MiB) and dashboard_port (default: no dashboard).",
    )

    @field_validator("init")
    @classmethod
    def _init_is_usable(cls, value: dict[str, Any]) -> dict[str, Any]:
        set_by_rushes = {"address": " (ray.address)", "namespace": "", "log_to_driver": "", "logging_level": ""}
        for key in value:
            if key in set_by_rushes:
                raise ValueError(f"{key} is set by Rushes{set_by_rushes[key]}; leave it out")
        limits = {"num_cpus": (1, None), "object_store_memory": (80 * 2**20, None), "dashboard_port": (1024, 65535)}
        for key, (low, high) in limits.items():
            number = value.get(key, low)
            whole = isinstance(number, int) and not isinstance(number, bool)
            if not whole or number < low or (high is not None and number > high):
                allowed = f">= {low}" + (f" and <= {high}" if high is not None else "")
                raise ValueError(f"{key}: found {shown(number)}; expected a whole number {allowed}")
        return value

    @property
    def num_cpus(self) -> int | None:
        """CPUs of a Ray that the run starts; None: all cores."""
        return self.init.get("num_cpus")

    @property
    def object_store_memory(self) -> int:
        """Bytes of its object store."""
        return self.init.get("object_store_memory", 512 * 2**20)

    @property
    def dashboard_port(self) -> int | None:
        """Port of its dashboard, on localhost; None: no dashboard."""
        return self.init.get("dashboard_port")


ChosenPart = SerializeAsAny[Part]
_DEFAULT = cast(Part, {})  # read as the part that `pipeline.config.parts.DEFAULTS` names, with its options' defaults


class Config(Section):
    """The whole config of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    generator: GeneratorConfig
    trainable: TrainableConfig = Field(default_factory=TrainableConfig)
    prompts: PromptsConfig
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    rewards: dict[str, RewardConfig] = Field(description="Name -> reward; at least one.", min_length=1)
    source: Annotated[ChosenPart, chosen_from("source")] = Field(_DEFAULT, description="Where takes come from.")
    signal: Annotated[ChosenPart, chosen_from("signal")] = Field(_DEFAULT, description="What the scores teach.")
    objective: Annotated[ChosenPart, chosen_from("objective")] = Field(_DEFAULT, description="The loss.")
    step: StepConfig = Field(default_factory=StepConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @model_validator(mode="after")
    def _some_reward_counts(self) -> Config:
        if all(weight == 0 for weight in self.reward_weights.values()):
            raise ValueError("rewards: every weight is 0, so nothing can be learned; set one above 0")
        return self

    @model_validator(mode="after")
    def _whole_branches(self) -> Config:
        shared = self.sampler.same_initial_noise
        if shared is not True and shared and self.step.takes % shared:
            raise ValueError(
                f"sampler.same_initial_noise: each {shared} takes begin alike, and step.takes ({self.step.takes}) is "
                "no multiple of that"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Config:
        best, golds = self.evaluation.keep_best, self.gold_rewards
        if best is not None and best not in self.rewards:
            raise ValueError(
                f"evaluation.keep_best: there is no reward {best!r}; name one of: {', '.join(self.rewards)}"
            )
        if self.evaluation.on_suspect == "rollback" and self.best_by is None:
            found = f"found {', '.join(golds)}" if golds else "there is none"
            raise ValueError(
                f"evaluation.on_suspect: rollback exports the best checkpoint by one reward of weight 0 ({found}); "
                "add one, or name a reward: evaluation.keep_best=NAME"
            )
        if self.best_by is not None and self.prompts.heldout is None:
            key = "keep_best" if best is not None else "on_suspect"
            raise ValueError(f"evaluation.{key}: there is no prompts.heldout to evaluate on; set it")
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay(self) -> Config:
        quantize, full = self.generator.quantize, self.trainable.kind == "full"
        if quantize != "none" and (full or self.rollout.merge_lora):
            other = "trainable.kind full" if full else "rollout.merge_lora"
            raise ValueError(f"generator.quantize: {quantize} freezes the weights, so not with {other}")
        return self

    @model_validator(mode="after")
    def _cached_embeddings_stay_valid(self) -> Config:
        if self.trainable.trains_text and self.generator.embedding_cache is not None:
            raise ValueError(
                "generator.embedding_cache: embeddings change with every version when text encoders are trained; "
                "leave it out, or set trainable.modules to denoiser"
            )
        return self

    @model_validator(mode="after")
    def _several_ranks_or_replicas(self) -> Config:
        for key, count in (("ranks", self.learner.ranks), ("replicas", self.learner.replicas)):
            if count > 1 and self.trainable.trains_text:
                need = "trainable.modules denoiser"
            elif count > 1 and self.generator.quantize != "none":
                need = "generator.quantize none"
            else:
                continue
            raise ValueError(f"learner.{key}: {count} {key} need {need}; set it, or learner.{key}=1")
        return self

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward, by name."""
        return {name: reward.weight for name, reward in self.rewards.items()}

    @property
    def gradient_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that the learner computes, with gradients."""
        return tuple(name for name, reward in self.rewards.items() if reward.gradient)

    def server_rewards(self, purpose: Literal["train", "eval"]) -> tuple[str, ...]:
        """Names of the rewards that servers score the groups of this purpose with."""
        if purpose == "eval":
            return tuple(self.rewards)
        return tuple(name for name, reward in self.rewards.items() if not reward.gradient)

    @property
    def served_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that have servers."""
        return self.server_rewards("train" if self.prompts.heldout is None else "eval")

    @property
    def gold_rewards(self) -> list[str]:
        """Rewards that judge and are never trained on: those of weight 0."""
        return [name for name, reward in self.rewards.items() if reward.weight == 0]

    @property
    def best_by(self) -> str | None:
        """The reward by which the best checkpoint is kept and may be exported; None: only the last ones are kept."""
        evaluation, golds = self.evaluation, self.gold_rewards
        if evaluation.keep_best is None and evaluation.on_suspect == "rollback" and len(golds) == 1:
            return golds[0]
        return evaluation.keep_best

    @property
    def eval_weights_tag(self) -> Literal["train", "ema"]:
        """Which weights are evaluated and exported: their EMA, if there is one."""
        return "ema" if self.optimizer.ema_decay > 0 else "train"
