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
from pipeline.core.errors import one_line
from pipeline.core.prompts import load_prompts
from pipeline.core.types import PromptItem
from pipeline.generators import adapters
from pipeline.generators.call.arguments import call_arguments, call_modes
from pipeline.generators.call.conditions import condition_arguments, conditions_of
from pipeline.generators.call.signature import parameters_of
from pipeline.generators.checkpoint_files import CONTROLNET, DENOISERS
from pipeline.generators.load.offload import decode_in_pieces
from pipeline.generators.load.pipeline import trained_modules
from pipeline.rl.group_plan import most_trained_steps, ode_sampling, steps_ahead, takes_of_call
from pipeline.rl.objectives import objective_of
from pipeline.tools.memory.meta_pipeline import Call, CannotEstimate, MetaPipeline, weight_bytes_of

_PROBED_STEPS = 2  # sampler steps that are run: the second shows which inputs stay the same


def _retained(on: str, activations: int) -> dict[str, int]:
    """What an actor's heap keeps of freed memory on a CPU (`actors.ray_options.KEPT_MEMORY`): measured on the shipped
    video generator, 100 to 160 MiB beside 66 MiB of activations, 350 MiB beside 450."""
    return {"freed memory that is kept": 2**26 + 6 * activations // 10} if on == "cpu" else {}


@dataclass(slots=True)
class RoleMemory:
    """Memory of one process of a role: part -> bytes, on the accelerator (`device`) and in main memory (`host`)."""

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


def estimate_memory(cfg: Config, bases: dict[str, int]) -> dict[str, Any]:
    """`bases`: role -> bytes of a process of that role that has only imported its libraries.

    Raises InputError (the checkpoint's configs are not available) and CannotEstimate (the pipeline does not run without
    weights).
    """
    rollout, shapes = _rollout(cfg, bases["rollout"])
    learner, trained = _learner(cfg, bases["learner"], shapes["trajectory"])
    media = shapes["media"]
    roles = {"rollout": rollout, "learner": learner}
    for name, reward in cfg.rewards.items():
        roles[f"reward {name}"] = RoleMemory(
            processes=reward.workers.max,
            on="cuda" if reward.resources.get("GPU", 0) > 0 else "cpu",
            host={"libraries": bases["reward"], "a group's media": media},
            device={"weights found here": _scorer_weights(reward.args)},
        )
    roles["controller"] = RoleMemory(processes=1, on="cpu", host={"libraries": bases["controller"]})
    active = cfg.step.groups * (steps_ahead(cfg) + 1)
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


def _device(device: str, resources: Mapping[str, float]) -> str:
    """Where a role will run: for `auto` its reserved GPUs decide, since this machine may not be the one it runs on."""
    if device == "auto":
        return "cuda" if resources.get("GPU", 0) > 0 or torch.cuda.is_available() else "cpu"
    return "cuda" if device.startswith("cuda") else "cpu"


def _run(meta: MetaPipeline, cfg: Config, takes: int) -> list[Call]:
    """The pipeline's own call for `takes` takes; returns the first step's denoiser calls.

    Raises CannotEstimate with the first cause.
    """
    prompts = load_prompts(cfg.prompts.train)[:1] if Path(cfg.prompts.train).exists() else []
    prompt = prompts[0] if prompts else PromptItem(index=0, text="a red circle on a table")
    placeholder_options: list[list[str]] = [[]] if conditions_of(prompt) else [[], *condition_arguments(meta.pipe)]
    failure: Exception | None = None
    for placeholders in placeholder_options:
        negative = "negative_prompt" in parameters_of(meta.pipe)
        for mode in call_modes(bool(placeholders) or bool(conditions_of(prompt)), negative):
            meta.reset()
            number = takes if mode.batched else 1
            kwargs = call_arguments(
                meta.pipe, cfg.generator, [prompt] * number, ode_sampling(cfg, _PROBED_STEPS), mode, placeholders
            )
            kwargs["generator"] = [torch.Generator().manual_seed(i) for i in range(number)]
            if number == 1:
                kwargs["generator"] = kwargs["generator"][0]
            try:
                with torch.no_grad():
                    meta.pipe(**kwargs)
            except Exception as error:  # pipelines refuse a way of calling with any exception
                failure = failure or error
                continue
            if meta.calls:
                return [call for call in meta.calls if call.step == 0]
    cause = f"{type(failure).__name__}: {one_line(failure)}" if failure else "no denoiser call"
    raise CannotEstimate(
        f"{cfg.generator.pretrained}: {type(meta.pipe).__name__} could not be run without weights ({cause}); its "
        "memory cannot be estimated. Train one step and read the peak memory in the run's summary.json instead"
    ) from failure


def _add_adapters(meta: MetaPipeline, cfg: Config) -> dict[str, torch.nn.Parameter]:
    """Adds what is trained to the networks without data; LoRA layers in float32, as the learner keeps them."""
    modules = trained_modules(meta.pipe, cfg.trainable)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with meta.mode, _modules_stay_in_place():
            adapters.add_adapters(modules, cfg.trainable, 0)
    finally:
        torch.set_default_dtype(default_dtype)
    return adapters.trainable(modules)


@contextmanager
def _modules_stay_in_place() -> Iterator[None]:
    """Within the block `Module.to` does nothing, for every module of the process.

    PEFT moves the layers it adds to the device and dtype of the layers they adapt. For networks without data there is
    no device to move to, `Module.to` fails on fake parameters that have weak references, and the layers must stay in
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


def _rollout(cfg: Config, base: int) -> tuple[RoleMemory, dict[str, int]]:
    """Memory of a rollout worker, and the bytes of a group's trajectory and media."""
    on = _device(cfg.rollout.device, cfg.rollout.resources)
    meta = MetaPipeline(cfg.generator, resolve_dtype(cfg.generator.dtype, on))
    if cfg.generator.offload != "none" and on != "cpu":
        decode_in_pieces(meta.pipe)
    takes = cfg.step.takes
    batch = takes_of_call(cfg)
    resident, offloaded = _weights(cfg, meta, on)
    largest = max(batch, cfg.evaluation.batch)
    _run(meta, cfg, largest)
    activations = max(meta.peaks.values(), default=0)
    _run(meta, cfg, batch)
    frames = cfg.generator.num_frames * cfg.generator.height * cfg.generator.width * 3
    trained = most_trained_steps(cfg)
    trajectory = _trajectory(cfg, meta, trained) * takes // batch  # of a group
    lora = _bytes(list(_add_adapters(meta, cfg).values())) if cfg.trainable.kind == "lora" else 0
    merged = _merged_base(meta) if cfg.rollout.merge_lora and lora else 0
    memory = RoleMemory(
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
            "activations": activations + _dequantized_bytes(cfg, meta),
            **_retained(on, activations),
        },
    )
    return memory, {"trajectory": trajectory, "media": frames * takes}


def _weights(cfg: Config, meta: MetaPipeline, on: str) -> tuple[int, int]:
    """Bytes of weights on the worker's device, and of those offloaded to main memory (`generator.offload`)."""
    sizes = {name: _weight_bytes(module, cfg, name) for name, module in meta.modules.items()}
    if on == "cpu" or cfg.generator.offload == "none":
        return sum(sizes.values()), 0
    if cfg.generator.offload == "group":  # the layer that computes and the next one, which is being copied
        layers = (layer for module in meta.modules.values() for layer in module.modules())
        whole = sum(sizes.values())
        return min(2 * max(_direct_bytes(layer) for layer in layers), whole), whole
    denoisers = sum(size for name, size in sizes.items() if name in DENOISERS)
    others = [size for name, size in sizes.items() if name not in DENOISERS]
    return denoisers + max(others, default=0), sum(others)


def _weight_bytes(module: torch.nn.Module, cfg: Config, name: str) -> int:
    """Bytes of a network's weights. With `generator.quantize: int8` a denoiser's linear layers hold one byte per weight
    and one scale per output."""
    size = weight_bytes_of(module)
    if name in DENOISERS and cfg.generator.quantize == "int8":
        for weight in _linear_weights(module):
            size -= weight.numel() * (weight.element_size() - 1) - weight.shape[0] * weight.element_size()
    return size


def _replayed(name: str) -> bool:
    """Whether the learner holds the component to replay with."""
    return name in DENOISERS or name.startswith(CONTROLNET)


def _linear_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


def _direct_bytes(layer: torch.nn.Module) -> int:
    """Bytes of a layer's direct weights, without those of its sublayers."""
    return _bytes([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])


def _dequantized_bytes(cfg: Config, meta: MetaPipeline) -> int:
    """Bytes of the largest int8 layer while it computes, in the sampling dtype."""
    if cfg.generator.quantize != "int8":
        return 0
    modules = [module for name, module in meta.modules.items() if name in DENOISERS]
    return max((_bytes([weight]) for module in modules for weight in _linear_weights(module)), default=0)


def _merged_base(meta: MetaPipeline) -> int:
    """Bytes of the copies of the base weights that merged LoRA keeps."""
    return sum(
        layer.get_base_layer().weight.numel() * layer.get_base_layer().weight.element_size()
        for module in meta.modules.values()
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    )


def _trajectory(cfg: Config, meta: MetaPipeline, trained: int) -> int:
    """Bytes of one pipeline call's part of a trajectory.

    Inputs that stay the same count once; per trained step the inputs that change and two samples (three where the
    objective needs the old mean); and the final latents. The sample is not stored among the inputs.
    """
    if meta.sample is None:
        return 0
    latents = meta.sample.nbytes
    tail = meta.sample.shape[1:]
    inputs: list[dict[int, int]] = [{}, {}]  # of the first step and of a later one: id of a tensor -> bytes
    for call in meta.calls:
        sizes = {id(t): t.nbytes for t in call.tensors() if t.ndim == 0 or t.shape[1:] != tail}
        inputs[min(call.step, 1)].update(sizes)
    same = inputs[0].keys() & inputs[1].keys()
    once = sum(inputs[0][key] for key in same)
    changing = sum(size for key, size in inputs[0].items() if key not in same)
    kept = 3 if objective_of(cfg).requirements.old_mean else 2
    return once + trained * (changing + kept * latents) + latents


def _learner(cfg: Config, base: int, trajectory: int) -> tuple[RoleMemory, int]:
    """Memory of the learner, and the bytes of the trained parameters in float32."""
    on = _device(cfg.learner.device, cfg.learner.resources)
    full = cfg.trainable.kind == "full"
    dtype = torch.float32 if full or cfg.learner.autocast != "none" else resolve_dtype(cfg.generator.dtype, on)
    takes = cfg.step.takes
    call_takes, replicas = min(takes_of_call(cfg), takes), cfg.learner.replicas
    trained = most_trained_steps(cfg)
    needs = objective_of(cfg).requirements
    largest = call_takes * trained if needs.joins_levels else call_takes
    micro = min(cfg.learner.micro_batch or call_takes, largest)
    meta = MetaPipeline(cfg.generator, dtype)
    calls = _run(meta, cfg, micro)
    trains_text = cfg.trainable.trains_text  # the learner then holds the whole pipeline and encodes prompts
    weights = sum(_weight_bytes(m, cfg, n) for n, m in meta.modules.items() if _replayed(n))
    if trains_text:  # the other networks are in the sampling dtype
        share = resolve_dtype(cfg.generator.dtype, on).itemsize / dtype.itemsize
        weights += sum(int(share * weight_bytes_of(m)) for n, m in meta.modules.items() if not _replayed(n))
    forward_only = max((meta.peaks[name] for name in meta.peaks if name in DENOISERS), default=0)
    pictures = _pictures_with_gradients(cfg, meta, micro) if needs.reward_gradient else {}
    parameters = list(_add_adapters(meta, cfg).values())
    encodings = 0
    if trains_text:  # held from the first micro-batch of a call's takes to the last
        _run(meta, cfg, call_takes)
        with meta.training(list(meta.encodings)) as (allocated, _):
            encodings = allocated.live
    activations = training_bytes(meta, calls, cfg) + _dequantized_bytes(cfg, meta)
    reference = weights if full and needs.reference_every else 0
    size = _bytes(parameters, 4)
    device = {
        "weights": weights + (0 if full else size),
        "reference": reference,
        "gradients": replicas * size,
        "optimiser (two moments)": 2 * size,
        "EMA": size if cfg.optimizer.ema_decay > 0 else 0,
        "activations": replicas * (activations + (forward_only if needs.reference_every else 0)),
        "text encoders' activations": encodings,
        **pictures,
    }
    device |= _retained(on, device["activations"] + pictures.get("decoder's activations", 0))
    memory = RoleMemory(
        processes=1,
        on=on,
        host={"libraries": base, "a step's trajectories": cfg.step.groups * trajectory},
        device={name: value for name, value in device.items() if value},
    )
    # Copies of weights, moments and EMA, made when weights are published and checkpoints saved.
    memory.host["weights going out, checkpoint"] = size * (4 if cfg.optimizer.ema_decay > 0 else 3)
    return memory, size


def _pictures_with_gradients(cfg: Config, meta: MetaPipeline, takes: int) -> dict[str, int]:
    """What a learner holds that decodes `takes` takes and scores them with gradients, part -> bytes. Takes are decoded
    one by one; what a scorer's own layers hold is not known here."""
    generator, replicas = cfg.generator, cfg.learner.replicas
    frames = takes * generator.num_frames * generator.height * generator.width * 3
    return {
        "VAE": weight_bytes_of(meta.modules["vae"]) if "vae" in meta.modules else 0,
        "rewards' weights found here": sum(_scorer_weights(cfg.rewards[name].args) for name in cfg.gradient_rewards),
        "decoder's activations": replicas * meta.decoding_bytes(takes),
        "pictures with gradients": replicas * 4 * 4 * frames,  # decoded, shifted, clamped, and their gradient
    }


def training_bytes(meta: MetaPipeline, calls: list[Call], cfg: Config) -> int:
    """Peak bytes of one micro-batch's forward and backward pass, gradients not counted."""
    modules = [meta.modules[name] for name in DENOISERS if name in meta.modules]
    if cfg.learner.activation_checkpointing:
        for module in modules:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
            module.train()
    enabled = cfg.learner.autocast != "none"
    with (
        torch.autocast("cpu", dtype=getattr(torch, cfg.learner.autocast, None), enabled=enabled),
        meta.training(calls, live_inputs=cfg.trainable.trains_text) as (allocated, _),
    ):
        saved = allocated.live
    grads = sum(p.numel() * 4 for m in modules for p in m.parameters() if p.grad is not None)
    return max(saved, allocated.peak - grads)


def _scorer_weights(args: dict[str, Any]) -> int:
    """Bytes of safetensors in the folders and files that a scorer's options name; hub ids count 0."""
    total = 0
    for value in args.values():
        path = Path(value).expanduser() if isinstance(value, str) else None
        if path is not None and path.is_dir():
            total += sum(file.stat().st_size for file in path.glob("**/*.safetensors"))
        elif path is not None and path.suffix == ".safetensors" and path.is_file():
            total += path.stat().st_size
    return total
