"""Memory of every role for a config, estimated before any weights are loaded: `rushes inspect --memory CONFIG`.

Networks are built from their configs without data (`pipeline.tools.memory.meta_pipeline`), so weights are counted and
not guessed, and activations are what the networks' own code would hold. Returns plain data; all numbers are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_dtype
from pipeline.core.prompts import load_prompts
from pipeline.core.types import PromptItem
from pipeline.generators import adapters
from pipeline.generators.call.arguments import call_arguments, call_modes
from pipeline.generators.call.conditions import condition_arguments, conditions_of
from pipeline.generators.call.signature import parameters_of
from pipeline.generators.checkpoint_files import DENOISERS
from pipeline.generators.load.offload import decode_in_pieces
from pipeline.generators.load.pipeline import trained_modules
from pipeline.rl.group_plan import ode_sampling, stochastic_steps, takes_of_call, trained_subset
from pipeline.rl.objectives import get_objective
from pipeline.tools.memory.meta_pipeline import Call, CannotPlan, MetaPipeline, weight_bytes_of

_PROBED_STEPS = 2  # sampler steps that the ghost takes: the second shows which inputs stay the same


def _kept(on: str, activations: int) -> dict[str, int]:
    """What an actor's heap keeps of freed memory on a CPU (`actors.ray_options.KEPT_MEMORY`): measured on the shipped
    video generator, 100 to 160 MiB beside 66 MiB of activations, 350 MiB beside 450."""
    return {"freed memory that is kept": 2**26 + 6 * activations // 10} if on == "cpu" else {}


@dataclass(slots=True)
class RolePlan:
    """One process of a role. `device`: bytes on the accelerator ("host" roles have none), `host`: in main memory."""

    processes: int
    on: str  # cpu | cuda
    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        host, device = sum(self.host.values()), sum(self.device.values())
        if self.on == "cpu":
            host, device = host + device, 0
        return {
            "processes": self.processes,
            "on": self.on,
            "parts": {**self.host, **self.device},
            "host_bytes": host,
            "device_bytes": device,
        }


def plan_memory(cfg: Config, bases: dict[str, int]) -> dict[str, Any]:
    """`bases`: role -> bytes of a process of that role that has imported its libraries and done nothing.

    Raises InputError (configs not to be had) and CannotPlan (the pipeline does not run without weights).
    """
    rollout, shapes = _rollout(cfg, bases["rollout"])
    learner, trained = _learner(cfg, bases["learner"], shapes["trajectory"])
    media = shapes["media"]
    roles = {"rollout": rollout, "learner": learner}
    for name, reward in cfg.rewards.items():
        roles[f"reward {name}"] = RolePlan(
            processes=reward.workers.max,
            on="cuda" if reward.resources.get("GPU", 0) > 0 else "cpu",
            host={"libraries": bases["reward"], "a group's media": media},
            device={"weights found here": _scorer_weights(reward.args)},
        )
    roles["controller"] = RolePlan(processes=1, on="cpu", host={"libraries": bases["controller"]})
    active = cfg.algorithm.groups_per_step * (cfg.algorithm.max_staleness + 1)
    store = {
        "trajectories": active * shapes["trajectory"],
        "media": min(active, cfg.rollout.workers.max + 2 * cfg.rollout.queue_capacity) * media,
        "weights of two versions": 2 * trained,
    }
    plans = {name: role.to_dict() for name, role in roles.items()}
    return {
        "generator": cfg.generator.pretrained,
        "roles": plans,
        "object_store": {"parts": store, "bytes": sum(store.values()), "limit": cfg.ray.object_store_memory},
        "host_bytes": sum(p["processes"] * p["host_bytes"] for p in plans.values()) + sum(store.values()),
        "device_bytes": sum(p["processes"] * p["device_bytes"] for p in plans.values()),
        "a_group": {"trajectory": shapes["trajectory"], "media": media},
    }


def _device(wanted: str, resources: Mapping[str, float]) -> str:
    """Where a role will run; `auto` on this machine may mean something else than where the config is meant for."""
    if wanted == "auto":
        return "cuda" if resources.get("GPU", 0) > 0 or torch.cuda.is_available() else "cpu"
    return "cuda" if wanted.startswith("cuda") else "cpu"


def _run(ghost: MetaPipeline, cfg: Config, takes: int) -> list[Call]:
    """The pipeline's own call for `takes` takes; returns the first step's denoiser calls.

    Raises CannotPlan with the first cause.
    """
    prompts = load_prompts(cfg.prompts.train)[:1] if Path(cfg.prompts.train).exists() else []
    prompt = prompts[0] if prompts else PromptItem(index=0, text="a red circle on a table")
    placeholder_options: list[list[str]] = [[]] if conditions_of(prompt) else [[], *condition_arguments(ghost.pipe)]
    failure: Exception | None = None
    for placeholders in placeholder_options:
        negative = "negative_prompt" in parameters_of(ghost.pipe)
        for mode in call_modes(bool(placeholders) or bool(conditions_of(prompt)), negative):
            ghost.reset()
            number = takes if mode.batched else 1
            kwargs = call_arguments(
                ghost.pipe, cfg.generator, [prompt] * number, ode_sampling(cfg, _PROBED_STEPS), mode, placeholders
            )
            kwargs["generator"] = [torch.Generator().manual_seed(i) for i in range(number)]
            if number == 1:
                kwargs["generator"] = kwargs["generator"][0]
            try:
                with torch.no_grad():
                    ghost.pipe(**kwargs)
            except Exception as error:  # pipelines refuse a form in any way; the last cause is told
                failure = failure or error
                continue
            if ghost.calls:
                return [call for call in ghost.calls if call.step == 0]
    cause = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}" if failure else "no denoiser call"
    raise CannotPlan(
        f"{cfg.generator.pretrained}: {type(ghost.pipe).__name__} could not be run without weights ({cause}); its "
        "memory cannot be planned. Run a step and look at the peak memory in the run's summary.json instead"
    ) from failure


def _add_adapters(ghost: MetaPipeline, cfg: Config) -> dict[str, torch.nn.Parameter]:
    """Adds what is trained to the networks without data; LoRA layers in float32, as the learner keeps them."""
    modules = trained_modules(ghost.pipe, cfg.trainable)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ghost.mode, _modules_stay_in_place():
            adapters.add_adapters(modules, cfg.trainable, 0)
    finally:
        torch.set_default_dtype(default_dtype)
    return adapters.trainable(modules)


@contextmanager
def _modules_stay_in_place() -> Iterator[None]:
    """Within the block `Module.to` does nothing, for every module of the process.

    PEFT moves the layers it adds to the device and dtype of the layers they adapt. For networks without data there is
    no device to move to, `Module.to` fails on fake parameters that have weak references, and the layers are wanted in
    float32. PEFT has no switch for it, so the method itself is replaced while the layers are added. Safe here because
    `rushes inspect` runs in one thread and nothing else moves modules meanwhile.
    """
    original = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *args, **kwargs: module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.to = original  # type: ignore[method-assign]


def _bytes(parameters: Sequence[torch.Tensor], each: int = 0) -> int:
    return sum(p.numel() * (each or p.element_size()) for p in parameters)


def _rollout(cfg: Config, base: int) -> tuple[RolePlan, dict[str, int]]:
    """The plan of a worker, and the bytes of a group's trajectory and media."""
    on = _device(cfg.rollout.device, cfg.rollout.resources)
    ghost = MetaPipeline(cfg.generator, resolve_dtype(cfg.generator.dtype, on))
    if cfg.generator.offload != "none" and on != "cpu":
        decode_in_pieces(ghost.pipe)
    takes = cfg.algorithm.group_size
    batch = takes_of_call(cfg)
    resident, offloaded = _weights(cfg, ghost, on)
    largest = max(batch, cfg.evaluation.batch)
    _run(ghost, cfg, largest)
    activations = max(ghost.peaks.values(), default=0)
    _run(ghost, cfg, batch)
    frames = cfg.generator.num_frames * cfg.generator.height * cfg.generator.width * 3
    trained = len(trained_subset(cfg.sampler, stochastic_steps(cfg.sampler, 0, 0), 0, 0))
    trajectory = _trajectory(cfg, ghost, trained) * takes // batch  # of a group
    lora = _bytes(list(_add_adapters(ghost, cfg).values())) if cfg.trainable.kind == "lora" else 0
    merged = _merged_base(ghost) if cfg.rollout.merge_lora and lora else 0
    plan = RolePlan(
        processes=cfg.rollout.workers.max,
        on=on,
        host={
            "libraries": base,
            "pictures as floats": 3 * 4 * frames * largest,  # the decoder's, the pipeline's and ours
            "media and trajectories of a call": (frames * takes + trajectory) * max(1, batch // takes),
            "weights off the accelerator": offloaded,
        },
        device={
            "weights": resident + lora + merged,
            "activations": activations + _unpacked(cfg, ghost),
            **_kept(on, activations),
        },
    )
    return plan, {"trajectory": trajectory, "media": frames * takes}


def _weights(cfg: Config, ghost: MetaPipeline, on: str) -> tuple[int, int]:
    """Bytes of weights that stay where the worker computes, and that wait in main memory (generator.offload)."""
    sizes = {name: _held(module, cfg, name) for name, module in ghost.modules.items()}
    if on == "cpu" or cfg.generator.offload == "none":
        return sum(sizes.values()), 0
    if cfg.generator.offload == "group":  # one layer at a time is there, and the next one on its way
        layers = (layer for module in ghost.modules.values() for layer in module.modules())
        whole = sum(sizes.values())
        return min(2 * max(_own_bytes(layer) for layer in layers), whole), whole
    denoisers = sum(size for name, size in sizes.items() if name in DENOISERS)
    others = [size for name, size in sizes.items() if name not in DENOISERS]
    return denoisers + max(others, default=0), sum(others)


def _held(module: torch.nn.Module, cfg: Config, name: str) -> int:
    """Bytes of a network; where generator.quantize is int8, a denoiser's linear layers hold one byte a weight, and a
    scale per output."""
    size = weight_bytes_of(module)
    if name in DENOISERS and cfg.generator.quantize == "int8":
        for weight in _linear_weights(module):
            size -= weight.numel() * (weight.element_size() - 1) - weight.shape[0] * weight.element_size()
    return size


def _linear_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


def _own_bytes(layer: torch.nn.Module) -> int:
    """Of a layer's own weights, not those of the layers in it."""
    return _bytes([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])


def _unpacked(cfg: Config, ghost: MetaPipeline) -> int:
    """The largest int8 layer as it is while it computes: in the sampling dtype."""
    if cfg.generator.quantize != "int8":
        return 0
    modules = [module for name, module in ghost.modules.items() if name in DENOISERS]
    return max((_bytes([weight]) for module in modules for weight in _linear_weights(module)), default=0)


def _merged_base(ghost: MetaPipeline) -> int:
    """Copies of the base weights that merging keeps aside."""
    return sum(
        layer.get_base_layer().weight.numel() * layer.get_base_layer().weight.element_size()
        for module in ghost.modules.values()
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    )


def _trajectory(cfg: Config, ghost: MetaPipeline, trained: int) -> int:
    """Bytes of one pipeline call's part: inputs that stay the same once; what changes, and two samples (three where the
    objective needs the old mean), per trained step; the finished latents. The sample is not stored among the inputs."""
    if ghost.sample is None:
        return 0
    latents = ghost.sample.nbytes
    tail = ghost.sample.shape[1:]
    held: list[dict[int, int]] = [{}, {}]
    for call in ghost.calls:
        own = {id(t): t.nbytes for t in call.tensors() if t.ndim == 0 or t.shape[1:] != tail}
        held[min(call.step, 1)].update(own)
    same = held[0].keys() & held[1].keys()
    once = sum(held[0][key] for key in same)
    changing = sum(size for key, size in held[0].items() if key not in same)
    kept = 3 if get_objective(cfg.algorithm.objective).needs_old_mean else 2
    return once + trained * (changing + kept * latents) + latents


def _learner(cfg: Config, base: int, trajectory: int) -> tuple[RolePlan, int]:
    """The plan of the learner, and the bytes of what it trains, in float32."""
    on = _device(cfg.learner.device, cfg.learner.resources)
    full = cfg.trainable.kind == "full"
    dtype = torch.float32 if full or cfg.learner.autocast != "none" else resolve_dtype(cfg.generator.dtype, on)
    takes = cfg.algorithm.group_size
    part, lanes = min(takes_of_call(cfg), takes), cfg.learner.replicas
    trained = len(trained_subset(cfg.sampler, stochastic_steps(cfg.sampler, 0, 0), 0, 0))
    most = part * trained if get_objective(cfg.algorithm.objective).joins_steps else part
    micro = min(cfg.learner.micro_batch or part, most)
    ghost = MetaPipeline(cfg.generator, dtype)
    calls = _run(ghost, cfg, micro)
    text = cfg.trainable.modules != "denoiser"  # it then holds the whole pipeline, to run it on the prompts again
    weights = sum(_held(m, cfg, n) for n, m in ghost.modules.items() if n in DENOISERS)
    if text:  # the others in the sampling dtype
        share = resolve_dtype(cfg.generator.dtype, on).itemsize / dtype.itemsize
        weights += sum(int(share * weight_bytes_of(m)) for n, m in ghost.modules.items() if n not in DENOISERS)
    without = max((ghost.peaks[name] for name in ghost.peaks if name in DENOISERS), default=0)
    parameters = list(_add_adapters(ghost, cfg).values())
    encodings = 0
    if text:  # kept from the first micro-batch of a call's takes to the last
        _run(ghost, cfg, part)
        with ghost.training(list(ghost.encodings)) as (live, _):
            encodings = live.live
    activations = training_bytes(ghost, calls, cfg) + _unpacked(cfg, ghost)
    reference = weights if full and cfg.algorithm.kl_beta > 0 else 0
    size = _bytes(parameters, 4)
    device = {
        "weights": weights + (0 if full else size),
        "reference": reference,
        "gradients": lanes * size,
        "optimiser (two moments)": 2 * size,
        "EMA": size if cfg.optimizer.ema_decay > 0 else 0,
        "activations": lanes * (activations + (without if cfg.algorithm.kl_beta > 0 else 0)),
        "text encoders' activations": encodings,
    }
    device |= _kept(on, device["activations"])
    plan = RolePlan(
        processes=1,
        on=on,
        host={"libraries": base, "a step's trajectories": cfg.algorithm.groups_per_step * trajectory},
        device={name: value for name, value in device.items() if value},
    )
    # What goes out and into a checkpoint: a copy of weights, moments and EMA, made when it is saved.
    plan.host["weights going out, checkpoint"] = size * (4 if cfg.optimizer.ema_decay > 0 else 3)
    return plan, size


def training_bytes(ghost: MetaPipeline, calls: list[Call], cfg: Config) -> int:
    """Bytes held at the worst moment of one micro-batch's forward and backward pass, gradients not counted."""
    modules = [ghost.modules[name] for name in DENOISERS if name in ghost.modules]
    if cfg.learner.activation_checkpointing:
        for module in modules:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
            module.train()
    enabled = cfg.learner.autocast != "none"
    with (
        torch.autocast("cpu", dtype=getattr(torch, cfg.learner.autocast, None), enabled=enabled),
        ghost.training(calls, live_inputs=cfg.trainable.modules != "denoiser") as (live, _),
    ):
        saved = live.live
    grads = sum(p.numel() * 4 for m in modules for p in m.parameters() if p.grad is not None)
    return max(saved, live.peak - grads)


def _scorer_weights(args: dict[str, Any]) -> int:
    """Bytes of safetensors in the folders and files that a scorer's options name; hub ids are not counted."""
    total = 0
    for value in args.values():
        path = Path(value).expanduser() if isinstance(value, str) else None
        if path is not None and path.is_dir():
            total += sum(file.stat().st_size for file in path.glob("**/*.safetensors"))
        elif path is not None and path.suffix == ".safetensors" and path.is_file():
            total += path.stat().st_size
    return total
