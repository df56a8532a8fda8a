"""The one typed config: sections, defaults, and one sentence per key (also the source of docs/config.md).

A config is a YAML file plus `key=value` overrides; unknown keys are refused with the nearest right one
(`pipeline.config.load` loads, merges and words the errors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pipeline.config.resources import HalfCpu, TenthCpu, WorkerCount, WorkerRange
from pipeline.core.storage import local_folder, shown

Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
# A URL becomes its scratch folder, which knows it (pipeline.core.storage), and is written back as the URL.
RunsFolder = Annotated[
    Path,
    BeforeValidator(local_folder),
    PlainSerializer(shown, return_type=str),
    WithJsonSchema({"type": "string", "format": "path"}),
]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
StepIndex = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str | None = Field(None, description="Run name, also its folder; default: config name and start time.")
    dir: RunsFolder = Field(
        Path("runs"), description="Folder that holds all runs, or a URL (s3://, gs://, file://) they are mirrored to."
    )
    seed: int = Field(0, ge=0, description="Seed of prompts order, takes, windows and LoRA initialisation.")
    steps: Count = Field(100, description="Optimisation steps (one step = rollout, score, learn).")


class GeneratorConfig(Section):
    pretrained: str = Field(description="diffusers checkpoint: local folder or hub id.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit) of the checkpoint.")
    pipeline: str | None = Field(
        None, description="diffusers pipeline class to load it with (LTXImageToVideoPipeline); default: its own."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' dtype for sampling; auto: bfloat16 on a GPU, float32 on the CPU."
    )
    height: Annotated[int, Field(ge=8)] = Field(512, description="Frame height in pixels.")
    width: Annotated[int, Field(ge=8)] = Field(512, description="Frame width in pixels.")
    num_frames: Count = Field(1, description="Frames per take; 1 for image generators.")
    fps: Positive = Field(8.0, description="Frames per second of the written videos and what video scorers are told.")
    guidance_scale: NonNegative = Field(1.0, description="Classifier-free guidance in rollout and training (1: none).")
    call_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the pipeline's __call__, such as max_sequence_length."
    )
    embedding_cache: Path | None = Field(
        None, description="Folder for prompt embeddings; once they are there, text encoders are not loaded."
    )
    compile: bool = Field(
        False,
        description="Compile the denoiser's blocks (torch.compile) in rollout workers and learner: faster, the "
        "same to rounding. Needs a C++ compiler (CPU) or Triton (GPU); where there is none, goes on without.",
    )
    offload: Literal["none", "idle", "group"] = Field(
        "none",
        description="Rollout workers on an accelerator keep there: everything; only what runs besides the denoiser; "
        "only the layer that runs. The last two also decode take by take and in tiles.",
    )
    quantize: Literal["none", "int8"] = Field(
        "none", description="Frozen denoiser weights under a LoRA; int8: weights alone, through torchao."
    )


class TrainableConfig(Section):
    kind: Literal["lora", "full"] = Field("lora", description="Train a PEFT LoRA or all weights of the denoiser.")
    modules: Literal["denoiser", "text_encoder", "both"] = Field(
        "denoiser", description="What gets the LoRA: the denoiser, the text encoders (as in TexForce), or both."
    )
    rank: Count = Field(16, description="LoRA rank.")
    alpha: Positive = Field(32.0, description="LoRA alpha; the adapter is scaled by alpha / rank.")
    targets: list[str] | Literal["auto"] = Field(
        "auto", description="LoRA target module names; auto: every linear layer inside the trained modules' blocks."
    )

    @property
    def words(self) -> str:
        """What is trained, for people."""
        if self.kind == "full":
            return "all weights"
        where = {"denoiser": "", "text_encoder": " on the text encoders", "both": " on denoiser and text encoders"}
        return f"LoRA of rank {self.rank}{where[self.modules]}"


class PromptsConfig(Section):
    train: Path = Field(description="Prompts trained on: .txt (a line each), .jsonl or .parquet.")
    heldout: Path | None = Field(None, description="Prompts evaluated on, never trained on.")


class WindowConfig(Section):
    kind: Literal["all", "random", "sliding"] = Field(
        "all", description="Which steps draw noise and train: all but the last; a random window; MixGRPO's sliding one."
    )
    size: Count = Field(2, description="Steps in a random or sliding window.")
    range: Annotated[list[StepIndex], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[first, end): the steps the window may cover; default: all but the last."
    )
    every: Count = Field(25, description="Sliding: optimisation steps before the window moves by one.")

    def bounds(self, sampler_steps: int) -> tuple[int, int]:
        """[first, end) of the steps that the window may cover, of `sampler_steps`. The last step never draws noise."""
        return (0, sampler_steps - 1) if self.range is None else (self.range[0], self.range[1])


class SamplerConfig(Section):
    kind: Literal["flow_sde", "dance_sde", "cps", "ddim", "lcm"] = Field(
        "flow_sde",
        description="Stochastic sampler of the rollouts (ddim: for epsilon/v/sample-prediction models; lcm: for "
        "latent consistency models).",
    )
    noise_level: Positive = Field(0.7, description="Noise: a of flow-SDE, eta of dance-SDE, CPS and DDIM.")
    steps: Count = Field(10, description="Sampler steps in training rollouts.")
    window: WindowConfig = Field(default_factory=WindowConfig)
    timestep_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Share of a take's stochastic steps that is trained, drawn per group (DanceGRPO: 0.6)."
    )
    same_initial_noise: bool = Field(False, description="All takes of a group start from one initial noise.")


class SegmentsConfig(Section):
    count: Count = Field(4, description="Segments a clip is split into (InstructVideo: 4).")
    frames: Count = Field(1, description="Frames looked at in each segment.")
    attenuation: NonNegative = Field(
        1.0, description="Lambda of exp(-lambda * 16/F * |frame - F/2|); 0: plain segmental mean."
    )
    aggregate: Literal["mean", "min"] | Share = Field(
        "mean",
        description="How a take's segments become its score: their weighted mean, the worst segment, or (a number p) "
        "the weighted mean of the best share p of them.",
    )
    normalize: bool = Field(True, description="Divide by the sum of weights, so the score keeps the scorer's scale.")


class RewardConfig(Section):
    scorer: str = Field(description="A registered scorer (`rushes score --list`) or `file.py:function`.")
    weight: float = Field(1.0, description="Weight in the sum of rewards or of advantages.")
    normalize: Literal["none", "step", "running"] = Field(
        "none",
        description="Before the rewards are combined: (score - mean) / std of the step's takes, or of all takes so "
        "far (kept in checkpoints).",
    )
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[lowest, highest] that the score, once normalised, counts as."
    )
    score_repeats: Count = Field(
        1,
        description="Scorings per training take, each of slightly shifted frames; u, their variance over the group's, "
        "lowers the take's advantage by exp(-u).",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Options of the scorer.")
    segments: SegmentsConfig = Field(
        default_factory=SegmentsConfig, description="How a frame scorer is applied to videos."
    )
    workers: WorkerCount = Field(
        WorkerRange(1, 1),
        json_schema_extra={"default": 1},
        description="Reward servers for this reward: a number, or a range.",
    )
    resources: TenthCpu = Field(
        {"CPU": 0.1},
        description="Ray resources reserved per server: CPU, GPU (may be a fraction), memory, custom ones.",
    )
    batch_items: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Takes of several waiting groups that one call of the scorer may hold; 0: a group a call, so that "
        "no score depends on timing, not even in its last bits.",
    )
    threads: Count = Field(1, description="Compute threads per server.")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray runtime environment of the servers, for a scorer whose packages do not go with the others': "
        "py_executable (a python of the same version, with the same Ray), pip, uv, conda, image_uri, env_vars.",
    )

    @field_validator("runtime_env")
    @classmethod
    def _known_runtime_env(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = ("py_executable", "pip", "uv", "conda", "image_uri", "env_vars")
        for key in value:
            if key not in known:
                raise ValueError(f"found the key {key!r}; allowed: {', '.join(known)}")
        variables = value.get("env_vars", {})
        if not isinstance(variables, dict) or not all(isinstance(v, str) for kv in variables.items() for v in kv):
            raise ValueError(f"env_vars: found {variables!r}; expected names and texts (quote numbers)")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> RewardConfig:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: found {self.clip}; the first number must be below the second")
        return self


class AdvantageConfig(Section):
    std: Literal["group", "global", "none"] = Field(
        "group", description="Divide by the std of the group, of the whole step, or not at all (Dr. GRPO)."
    )
    clamp: Positive = Field(5.0, description="Advantages are clamped to +- this.")
    combine: Literal["rewards", "advantages", "pareto"] = Field(
        "rewards",
        description="Several rewards: weighted sum of rewards; of each reward's own advantages; or the latter for the "
        "takes that no other take of the group beats in every reward (pareto), the others not being trained.",
    )
    zero_std: Literal["train", "filter"] = Field(
        "train", description="Groups of equal rewards: keep (no policy gradient) or filter and admit another group."
    )


class AlgorithmConfig(Section):
    objective: Literal["grpo", "grpo_guard", "flow_dppo", "awm"] = Field(
        "grpo",
        description="Policy loss on the sampler's log-probs (grpo, grpo_guard, flow_dppo), or on the flow-matching "
        "likelihood of finished takes (awm), whose takes are drawn without noise: sampler.kind is then not used.",
    )
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Takes per prompt (K).")
    groups_per_step: Count = Field(8, description="Groups per optimisation step.")
    updates_per_step: Count = Field(
        1, description="Optimiser updates per step; beyond 1 the later ones are off-policy."
    )
    clip_low: Positive = Field(
        1e-4, description="PPO clip: ratio >= 1 - clip_low. flow_dppo: the KL threshold is clip_high."
    )
    clip_high: Positive = Field(1e-4, description="PPO clip: ratio <= 1 + clip_high.")
    kl_beta: NonNegative = Field(0.0, description="Weight of the closed-form KL to the reference (starting) policy.")
    kl_every: Count = Field(
        1,
        description="The KL at every n-th trained noise level of a group, n times as heavy, from group to group at "
        "others: the same on average, for 1/n of the reference's forward passes.",
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        0, description="Learner version minus policy version at consumption (0: strictly on-policy)."
    )
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)


class OptimizerConfig(Section):
    lr: Positive = Field(1e-4, description="AdamW learning rate.")
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW betas: decay rates of the first and the second moment."
    )
    eps: Positive = Field(1e-8, description="AdamW epsilon.")
    weight_decay: NonNegative = Field(1e-4, description="AdamW weight decay.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Updates of linear warm-up.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="EMA of the trained weights, used for evaluation and export (0: no EMA)."
    )


class LearnerConfig(Section):
    ranks: Count = Field(
        1, description="Learner processes, one per GPU: weights are sharded over them (FSDP2), and each trains a share."
    )
    context_parallel: Count = Field(
        1, description="Ranks that split one take's sequence (long videos); must divide learner.ranks."
    )
    replicas: Count = Field(
        1,
        description="Groups replayed side by side, a thread each: small models on a CPU gain nothing from `threads`.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    micro_batch: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Takes per forward pass; 0: the whole group at one trained step; beyond the group size (objective "
        "awm): several trained steps of a group at once, faster for small models and the same to rounding.",
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field(
        "none", description="Autocast of the denoiser; weights, latents and log-probs stay float32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    resources: HalfCpu = Field({"CPU": 0.5}, description="Ray resources reserved per rank: CPU, GPU, memory, custom.")
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Compute threads per rank, and of each of its replicas; 0: all cores, shared by a node's ranks.",
    )


class RolloutConfig(Section):
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    workers: WorkerCount = Field(
        WorkerRange(1, 1),
        json_schema_extra={"default": 1},
        description="Rollout workers: a number, or a range within which the pool follows its queue.",
    )
    batch: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Takes per pipeline call; 0: the whole group at once; twice the group size or more: several groups "
        "of a step at once, faster for small models and the same to rounding.",
    )
    merge_lora: bool = Field(
        False, description="Merge the LoRA into the weights for sampling (faster, same to rounding)."
    )
    resources: HalfCpu = Field(
        {"CPU": 0.5}, description="Ray resources reserved per worker: CPU, GPU, memory, custom ones."
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Compute threads per worker; 0: cores / workers.")

    @property
    def queue_capacity(self) -> int:
        """Items that each queue between the roles may hold. With fewer than one per worker, workers that finish at the
        same time would wait to hand over."""
        return max(8, self.workers.max)


class FaultsConfig(Section):
    max_attempts: Count = Field(
        3,
        description="Attempts at a group's rollout, and at its scoring, before the group fails.",
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        2,
        description="Restarts of a worker that does not start, and of a learner or controller that dies without a new "
        "step in between, before the run fails.",
    )
    max_failed_groups: Annotated[int, Field(ge=0)] = Field(
        3, description="More failed groups than this in a row end the run with an error."
    )
    call_timeout_s: Positive = Field(
        1800.0,
        description="A rollout or scoring call that takes longer (loading the weights included) is stopped; its groups "
        "are tried again on another worker.",
    )


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = Field(
        0, description="Evaluate every N steps as well as before and after (0: only those)."
    )
    prompts: Annotated[int, Field(ge=0)] = Field(64, description="Held-out prompts evaluated (0: all).")
    takes_per_prompt: Count = Field(1, description="Takes per held-out prompt, on fixed seeds.")
    steps: Count = Field(20, description="ODE sampler steps.")
    batch: Count = Field(16, description="Takes per denoiser call in evaluation.")


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = Field(
        25, description="Save every N steps (0: only at the end and when stopped)."
    )
    keep: Count = Field(2, description="Checkpoints kept; older ones are deleted.")


class TrackingConfig(Section):
    backends: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"], description="Trackers besides metrics.jsonl."
    )
    save_takes_every: Annotated[int, Field(ge=0)] = Field(
        0, description="Save the training takes of every Nth step as files (0: none)."
    )


_SET_BY_RUSHES = {"address": " (ray.address)", "namespace": "", "log_to_driver": "", "logging_level": ""}
_INIT_LIMITS = {
    "num_cpus": (1, 2**62),
    "object_store_memory": (80 * 2**20, 2**62),  # Ray starts with no less
    "dashboard_port": (1024, 65535),
}


class RayConfig(Section):
    address: str | None = Field(None, description="Ray address; default: a running cluster if found, else a local one.")
    init: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of `ray.init` for a local Ray, such as num_cpus (default: all cores), "
        "object_store_memory (bytes; default: 512 MiB) and dashboard_port (default: no dashboard).",
    )

    @field_validator("init")
    @classmethod
    def _usable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _SET_BY_RUSHES:
                raise ValueError(f"{key} is set by Rushes{_SET_BY_RUSHES[key]}; leave it out")
        for key, (low, high) in _INIT_LIMITS.items():
            number = value.get(key, low)
            if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                upper = f" and <= {high}" if high < 2**62 else ""
                raise ValueError(f"{key}: found {number!r}; expected a whole number >= {low}{upper}")
        return value

    @property
    def num_cpus(self) -> int | None:
        """CPUs of a local Ray; None: all cores."""
        return self.init.get("num_cpus")

    @property
    def object_store_memory(self) -> int:
        """Bytes of a local Ray's object store."""
        return self.init.get("object_store_memory", 512 * 2**20)

    @property
    def dashboard_port(self) -> int | None:
        """Port of a local Ray's dashboard, on localhost; None: no dashboard."""
        return self.init.get("dashboard_port")


class Config(Section):
    """The whole config of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    generator: GeneratorConfig
    trainable: TrainableConfig = Field(default_factory=TrainableConfig)
    prompts: PromptsConfig
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    rewards: dict[str, RewardConfig] = Field(description="Name -> reward; at least one.", min_length=1)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        last = self.sampler.steps - 1  # the last transition is never stochastic (its std is ~0)
        window = self.sampler.window
        if self.sampler.steps < 2:
            raise ValueError("sampler.steps: 1 leaves nothing to train (the last step is deterministic); use 2 or more")
        start, stop = window.bounds(self.sampler.steps)
        if not 0 < stop <= last:
            raise ValueError(
                f"sampler.window.range: the end, {stop}, is outside 1..{last} (the last step never draws noise)"
            )
        if start >= stop:
            raise ValueError(f"sampler.window.range: the first step, {start}, must be below the end, {stop}")
        if window.kind != "all" and window.size > stop - start:
            raise ValueError(f"sampler.window.size: {window.size} does not fit between steps {start} and {stop}")
        if self.algorithm.updates_per_step > self.algorithm.groups_per_step:
            raise ValueError(
                f"algorithm.updates_per_step: {self.algorithm.updates_per_step} exceeds algorithm.groups_per_step "
                f"({self.algorithm.groups_per_step}); each update needs at least one whole group"
            )
        if self.trainable.modules != "denoiser" and self.trainable.kind == "full":
            raise ValueError(
                f"trainable.modules: {self.trainable.modules} needs trainable.kind lora; full weights are trained "
                "for the denoiser alone"
            )
        if self.generator.quantize != "none" and (self.trainable.kind == "full" or self.rollout.merge_lora):
            other = "trainable.kind full" if self.trainable.kind == "full" else "rollout.merge_lora"
            raise ValueError(f"generator.quantize: {self.generator.quantize} freezes the weights, so not with {other}")
        if self.generator.compile and self.generator.offload == "group":
            raise ValueError("generator.compile: not with generator.offload group, which moves single layers; use idle")
        if self.trainable.modules != "denoiser" and self.generator.embedding_cache is not None:
            raise ValueError(
                "generator.embedding_cache: embeddings change with every version when text encoders are trained; "
                "leave it out, or set trainable.modules to denoiser"
            )
        for apart, count in (("ranks", self.learner.ranks), ("replicas", self.learner.replicas)):
            if count > 1 and (self.trainable.modules != "denoiser" or self.generator.quantize != "none"):
                key = "trainable.modules" if self.trainable.modules != "denoiser" else "generator.quantize"
                only = "denoiser" if key == "trainable.modules" else "none"
                raise ValueError(f"learner.{apart}: {count} {apart} need {key} {only}; set it, or learner.{apart}=1")
        if self.learner.ranks > 1 and self.learner.replicas > 1:
            raise ValueError(
                f"learner.replicas: {self.learner.replicas} replicas share one process, not learner.ranks "
                f"{self.learner.ranks}; set one of them to 1"
            )
        if self.learner.ranks % self.learner.context_parallel:
            raise ValueError(
                f"learner.context_parallel: {self.learner.context_parallel} does not divide learner.ranks "
                f"({self.learner.ranks})"
            )
        if self.algorithm.objective == "grpo_guard" and self.sampler.kind not in ("flow_sde", "dance_sde"):
            raise ValueError("algorithm.objective: grpo_guard needs sampler.kind flow_sde or dance_sde")
        if self.algorithm.objective == "awm":
            if self.algorithm.updates_per_step != 1:
                raise ValueError("algorithm.updates_per_step: must be 1 with algorithm.objective awm (on-policy only)")
            if self.sampler.same_initial_noise:
                raise ValueError(
                    "sampler.same_initial_noise: must be false with algorithm.objective awm, whose takes differ by "
                    "their initial noise alone"
                )
        if self.algorithm.kl_every > 1 and self.algorithm.kl_beta == 0:
            raise ValueError(
                f"algorithm.kl_every: {self.algorithm.kl_every} thins out a KL that has no weight; set "
                "algorithm.kl_beta above 0, or leave kl_every out"
            )
        if all(reward.weight == 0 for reward in self.rewards.values()):
            raise ValueError("rewards: every weight is 0, so nothing can be learned; set one above 0")
        return self

    @property
    def reward_weights(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    @property
    def eval_weights_tag(self) -> Literal["train", "ema"]:
        """The weights that are evaluated and exported: their EMA, where it is kept."""
        return "ema" if self.optimizer.ema_decay > 0 else "train"
