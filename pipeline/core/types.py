"""The records that cross a role boundary (controller, rollout, reward, learner).

Large tensors travel as numpy arrays (`pipeline.core.tensors`), so that Ray's object store shares them without copies.
Shape letters: K takes of a group, W trained sampler steps, F frames, H height, W_px width, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenTake:
    """A take of a prompt that a data set gives and compares with others."""

    path: str  # of the picture or clip
    label: float  # how good the data says it is among the takes of its row


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptItem:
    """One row of a prompt set."""

    index: int  # row in the set, from 0
    text: str
    negative: str | None = None
    image: str | None = None  # path of a conditioning image
    clip: str | None = None  # path of a clip or picture that the text describes
    metadata: dict[str, Any] = field(default_factory=dict)  # for scorers; never names a file by itself
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)  # metadata key -> paths that it named, checked
    takes: tuple[GivenTake, ...] = ()  # that the row compares


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How the denoising chain of one group is drawn."""

    kind: str  # flow_sde | dance_sde | cps | ddim | lcm | ode
    noise_level: float
    num_steps: int
    stochastic_steps: tuple[int, ...]  # step indices (0 = noisiest) that draw noise; () for ode
    trained_steps: tuple[int, ...]  # those of them that are recorded and trained; () means no trajectory is kept
    guidance_scale: float


Lineage = tuple[tuple[int, int], ...]  # (from this sampler step on, seed), in order


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """Where takes are drawn from instead of from pure noise."""

    step: int  # sampler step to go on from, 1 or later; the ones before are not computed
    # tensors.PackedTensor [K, ...]: the samples x_t at that step, as a trajectory records them. None: finished latents,
    # which the worker encodes from the clip that each take's prompt names.
    states: Any = None
    clean: bool = False  # `states` are finished latents, which each take's initial noise is added to
    offset_noise: float = 0.0  # std of the further noise of a frame's whole channel, where noise is added


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWork:
    """prompts -> rollout. The unit of work and of retry: same seeds and policy version give the same takes."""

    group: int  # unique within a run for its purpose, increasing in admission order
    attempt: int  # 1 for the first try
    purpose: Literal["train", "eval"]
    step: int  # the optimisation step that will consume the group (eval: the version evaluated)
    prompts: tuple[PromptItem, ...]  # [K]; K times the same prompt when training on takes that are compared
    seeds: tuple[int, ...]  # [K] one per take
    sampling: SamplingSpec
    initial: tuple[int, ...] = ()  # [K], seeds of the initial noise where these are not `seeds`
    forks: tuple[Lineage, ...] = ()  # [K], further seeds of a take's noise, each from a sampler step on; (): none
    begin: Begin | None = None  # None: from the pipeline's own start
    drawn: bool = True  # False: the takes are the clips that their prompts name, encoded; only conditions are recorded
    scoring_seed: int | None = None  # of the rewards' frame picks, the same for all takes; None: centre picks
    labels: tuple[float, ...] = ()  # [K], how good the data says its takes are; (): rewards score them

    @property
    def takes(self) -> int:
        return len(self.seeds)

    @property
    def noise_seeds(self) -> tuple[int, ...]:
        """[K], of the initial noise."""
        return self.initial or self.seeds

    @property
    def lineages(self) -> tuple[Lineage, ...]:
        """[K], all seeds of a take's noise. Takes are equal up to the first step at which theirs differ, given equal
        conditions and initial noise: a fork is a take whose lineage begins like its parent's."""
        forks = self.forks or ((),) * self.takes
        return tuple(((0, seed), *rest) for seed, rest in zip(self.seeds, forks, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedCall:
    """One denoiser call. `args` and `kwargs` are trees of dicts, lists and tuples whose tensors are
    `tensors.PackedTensor`, `tensors.SharedSlot` (stored once in `Trajectory.shared`), `tensors.SampleCopies` (the
    step's own sample) or `tensors.CallOutput` (of a call in `before`)."""

    module: str  # component name, such as transformer, transformer_2, unet
    args: Any
    kwargs: Any
    processors: dict[str, str] = field(default_factory=dict)  # attention layer -> class installed while sampling
    before: tuple[RecordedCall, ...] = ()  # calls of other modules, whose outputs this one is given (ControlNets)

    @property
    def inputs(self) -> dict[str, Any]:
        """The whole input tree; its leaf paths are those of generators.spec.InputKey."""
        tree: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs}
        return {**tree, "before": [call.inputs for call in self.before]} if self.before else tree

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that are called, in order."""
        return (*(call.module for call in self.before), self.module)

    def with_inputs(self, tree: dict[str, Any]) -> RecordedCall:
        """The same call with another input tree."""
        before = tuple(call.with_inputs(each) for call, each in zip(self.before, tree.get("before", ()), strict=True))
        return replace(self, args=tree["args"], kwargs=tree["kwargs"], before=before)


@dataclass(frozen=True, slots=True)
class StepGuidance:
    """How the denoiser outputs of one step become what the scheduler receives (see pipeline.generators.guidance)."""

    rule: str = "identity"  # a key of guidance.RULES, or guidance.LINEAR_FIT
    scale: float = 1.0
    extra: tuple[float, ...] = ()  # the rule's further numbers: a rescale factor, a cap, or the weights of a linear fit


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """One trained transition x_t -> x_next."""

    index: int  # sampler step, 0 = noisiest
    sigma: float  # flow: sigma in [0, 1]; ddim: alphas_cumprod at t
    sigma_next: float
    sigma_cap: float  # flow-SDE: in place of sigma = 1 in 1 / (1 - sigma); ddim: clamp of x0; lcm: scaled timestep
    sample: Any  # tensors.PackedTensor [K, ...], x_t as the scheduler was given it (storage dtype)
    next_sample: Any  # tensors.PackedTensor [K, ...], the x_next that was continued from, rounded before its log-prob
    log_prob: np.ndarray | None  # [K] float32; None where the step drew no noise
    mean: np.ndarray | None  # [K, ...] float32, kept only for objectives that need the old mean
    guidance: StepGuidance
    calls: tuple[RecordedCall, ...]
    mask: Any = None  # tensors.PackedTensor bool [K, ...]: the values of next_sample the policy chose; None: all


@dataclass(frozen=True, kw_only=True, slots=True)
class CallInputs:
    """The inputs of a pipeline call, from which the learner can run the text encoders again."""

    prompts: tuple[PromptItem, ...]  # [K]
    seeds: tuple[int, ...]  # [K], of the initial noise
    mode: dict[str, bool]  # fields of generators.call.arguments.CallMode
    placeholders: tuple[str, ...]  # conditions that were made up


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryPart:
    """The takes [start, stop) of a group that were denoised in one pipeline call."""

    start: int
    stop: int
    steps: tuple[RecordedStep, ...]  # [W], in sampling order; their K is stop - start
    shared: tuple[Any, ...]  # tensors.PackedTensor: step-invariant denoiser inputs, stored once
    final: Any  # tensors.PackedTensor [K, ...], the finished latents (x0); None where they are not known
    call_inputs: CallInputs | None = None  # only where text encoders are trained
    drawn: bool = True  # False: conditions alone, whose recorded samples are made up (generators.condition_pass)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """rollout -> learner, large."""

    group: int
    version: int
    sampling: SamplingSpec
    parts: tuple[TrajectoryPart, ...]
    spec: Any  # generators.spec.PolicySpec of the probed pipeline (guidance rules, batch axes)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchSpec:
    """What every learner rank knows of a group's micro-batch, whether or not it has the trajectory."""

    part: int  # of the trajectory
    position: int  # among the part's micro-batches
    takes: int
    modules: tuple[str, ...]  # called in this order; for a pass of another policy, its name
    extra_replay_check: bool  # comparing its replay with the rollout would cost an extra forward pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """rollout -> reward, large. One video type for everything: an image is F = 1."""

    frames: np.ndarray  # uint8 [K, F, H, W_px, 3], RGB
    fps: float

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 5 or self.frames.shape[-1] != 3:
            raise ValueError(f"Media.frames must be uint8 [K, F, H, W, 3], got {self.frames.dtype} {self.frames.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardScores:
    """One reward's scores of one group."""

    values: np.ndarray  # float32 [K]; NaN where the reward does not apply to the take's prompt
    variance: np.ndarray | None = None  # float32 [K], of a take's repeated scorings (rewards.*.score_repeats)
    segment_values: np.ndarray | None = None  # float32 [K, S], frame scorers on video
    segment_weights: np.ndarray | None = None  # float32 [S], or [K, S] where they depend on the take
    segment_frames: np.ndarray | None = None  # int64 [S, n], the frames that were scored
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # auxiliary float32 [K], logged only
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeCaption:
    """What a tracker shows beside a take."""

    prompt: str
    scores: dict[str, float]  # by reward; those that apply

    def __str__(self) -> str:
        return ", ".join([self.prompt, *(f"{name} {score:.3f}" for name, score in self.scores.items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeMeasurements:
    """Of held-out takes, small: what `pipeline.rewards.guards` measures without a model."""

    values: dict[str, np.ndarray]  # measurement -> float32 [K]
    descriptors: np.ndarray  # uint8 [K, D], colours of a coarse grid of cells, to tell takes apart


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutMeta:
    """rollout -> controller, small."""

    group: int
    attempt: int
    version: int
    worker: str
    seconds: dict[str, float]  # per phase: encode, denoise, decode, total; load: of new weights before the first group
    trajectory_bytes: int
    media_bytes: int
    # Only where the learner has several ranks, each of which then reads the trajectories that it replays.
    micro_batches: tuple[MicroBatchSpec, ...] | None = None
    measured: TakeMeasurements | None = None  # of takes of an evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSet:
    """What is trained, as float32 (or stored dtype) arrays. `checksum` covers names, shapes, dtypes, bytes."""

    kind: Literal["lora", "full"]
    tensors: dict[str, Any]  # name -> packed array (pipeline.core.tensors)
    checksum: str


PolicyTag = Literal["train", "ema", "old"]
"""The weights in training, their EMA, or the old policy of an objective that has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion:
    """learner -> rollout. A worker draws only with weights of this very `checksum`."""

    number: int
    tag: PolicyTag
    checksum: str
    weights: Any  # object reference of a WeightSet

    @property
    def key(self) -> tuple[int, str, str]:
        return self.number, self.tag, self.checksum


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """signal -> learner, small: what a group teaches."""

    advantages: np.ndarray | None = None  # float32 [K], of every take
    pairs: np.ndarray | None = None  # int64 [P, 2]: the better take of a pair and the worse one
    pair_weights: np.ndarray | None = None  # float32 [P], 1 on average over a step
    pair_gaps: np.ndarray | None = None  # float32 [P]: the better take's reward minus the worse one's


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupBatch:
    """What the learner trains on: one group."""

    # On its way to the learner's ranks, a reference in its place. None: this rank, of several, replays no part of it.
    trajectory: Trajectory | None
    feedback: Feedback
    staleness: int = 0  # the learner's version minus that of the policy that drew the takes; 0: they were given
    prompts: tuple[PromptItem, ...] = ()  # [K]; () where no reward is computed in the learner
    micro_batches: tuple[MicroBatchSpec, ...] | None = None  # None: read from the trajectory

    @property
    def held(self) -> Trajectory:
        """The trajectory. Raises RuntimeError where this rank was not given it."""
        if self.trajectory is None:
            raise RuntimeError("this learner rank was not given the trajectory of a group that it replays")
        return self.trajectory
