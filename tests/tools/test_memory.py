"""The parts of `rushes inspect --memory` against what loaded models and real rollouts hold."""

from __future__ import annotations

import contextlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

from jobs import cli
from jobs.common import memory_report
from pipeline.config.load import load_config
from pipeline.core.tensors import tree_bytes
from pipeline.core.types import PromptItem
from pipeline.generators.load.pipeline import load_pipeline
from pipeline.generators.policy import Policy
from pipeline.generators.policy_pipeline import PolicyPipeline
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work
from pipeline.tools.memory.estimate import _add_adapters, _rollout, _run, _weight_bytes, estimate_memory, training_bytes
from pipeline.tools.memory.meta_pipeline import MetaPipeline, weight_bytes_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NONE = dict.fromkeys(("rollout", "learner", "reward", "controller"), 0)
SMALL = ["step.takes=2", "evaluation.batch=2"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module", params=["quickstart-image", "quickstart"])
def case(request):
    """(config, the pipeline with its weights, the one without)"""
    cfg = load_config(ROOT / "configs" / f"{request.param}.yaml", SMALL)
    generator = cfg.generator.model_copy(update={"pretrained": str(ROOT / cfg.generator.pretrained)})
    cfg = cfg.model_copy(update={"generator": generator})
    return cfg, load_pipeline(generator, torch.device("cpu")), MetaPipeline(generator, torch.float32)


def test_weights_are_exact(case):
    _, pipe, meta = case
    loaded = {n: weight_bytes_of(m) for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    assert loaded == {name: weight_bytes_of(module) for name, module in meta.modules.items()}


@contextlib.contextmanager
def kept_for_backward(*modules: torch.nn.Module):
    """What autograd keeps for the backward pass within the block, the modules' weights left out: tensors by storage."""
    weights = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield held


def storage_bytes(held: dict[int, torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def saved_bytes(pipe, calls) -> int:
    """What autograd keeps for the backward pass of these calls, weights left out; every storage once."""
    module = pipe.transformer.requires_grad_(True)
    with kept_for_backward(module) as held:
        outs = [module(*call.args, **call.kwargs)[0] for call in calls]
        size = storage_bytes(held)
    del outs
    module.requires_grad_(False)
    return size


def test_a_decoding_with_gradients_holds_what_autograd_keeps(case):
    cfg, pipe, meta = case
    _run(meta, cfg, 2)
    planned = meta.decoding_bytes(2)
    latents = torch.zeros(1, *meta.decodings[0].args[0].shape[1:]).requires_grad_()
    with kept_for_backward(pipe.vae) as held:
        pictures = pipe.vae.decode(latents)[0]
    measured = storage_bytes(held)
    assert pictures.requires_grad and 0.8 < planned / measured < 1.5, (planned, measured)


def test_activations_are_what_autograd_keeps(case):
    cfg, pipe, meta = case
    calls = _run(meta, cfg, 2)
    measured = saved_bytes(pipe, calls)
    _add_adapters(meta, cfg)
    with meta.training(calls) as (allocated, _):
        planned = allocated.live
    assert abs(planned / measured - 1) < 0.2, (planned, measured)
    assert training_bytes(meta, calls, cfg) >= planned
    checkpointed = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"activation_checkpointing": True})})
    assert training_bytes(meta, calls, checkpointed) < 0.7 * planned


def test_trajectories_and_media_are_what_a_rollout_leaves(case):
    cfg, pipe, _ = case
    policy = Policy(PolicyPipeline(cfg, pipe, torch.device("cpu")))
    policy.probe()
    media, trajectory, _ = policy.rollout(train_work(cfg, 0, 0, PromptItem(index=0, text="a red circle")))
    held = sum(
        tree_bytes([part.shared, part.final, [[s.sample, s.next_sample, inputs(s)] for s in part.steps]])
        for part in trajectory.parts
    )
    planned = _rollout(cfg, 0)[1]
    assert planned["media"] == media.frames.nbytes
    assert abs(planned["trajectory"] / held - 1) < 0.2, (planned, held)


def inputs(step):
    return [[call.args, call.kwargs] for call in step.calls]


def test_trained_text_encoders_are_what_autograd_keeps(tiny_sd3):
    """The learner then holds the whole pipeline, and the encoders' graph from the first micro-batch to the last."""
    cfg = tiny.config(tiny_sd3, trainable={"modules": "both"}, objective={"kl_beta": 0.0}, step={"takes": 4})
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    _, trajectory, _ = policy.rollout(train_work(cfg, 0, 0, PromptItem(index=0, text="a red circle")))
    replayer = Replayer(trajectory.parts[0], policy.spec, learner.modules, learner.device)
    with kept_for_backward(*learner.trained.values()) as held:
        live = learner.replicas[0].text.override_text(replayer, trajectory.sampling)
    parts = estimate_memory(cfg, NONE)["roles"]["learner"]["parts"]
    planned, measured = parts["text encoders' activations"], storage_bytes(held)
    del live
    assert abs(planned / measured - 1) < 0.2, (planned, measured)
    modules = [m for m in learner.replicas[0].text.pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert parts["weights"] == sum(weight_bytes_of(m) for m in modules)  # LoRA layers with them


def test_offloaded_and_int8_weights(tiny_sd3):
    """Group offload leaves the weights in main memory but for two layers; int8 takes a byte a weight and its scales."""
    gpu = {"rollout": {"resources": {"GPU": 1}}}
    roles = {
        name: _rollout(tiny.config(tiny_sd3, generator=generator, **gpu), 0)[0].to_dict()["parts"]
        for name, generator in {
            "none": {},
            "idle": {"offload": "idle"},
            "group": {"offload": "group"},
            "int8": {"quantize": "int8"},
        }.items()
    }
    on_device = {name: parts["weights"] for name, parts in roles.items()}
    assert max(on_device["idle"], on_device["int8"]) < on_device["none"]
    # The tiny model's token embedding is most of it: no more than the whole is ever there.
    assert roles["group"]["weights off the accelerator"] > 0 and on_device["group"] <= on_device["none"]
    if find_spec("torchao"):
        from pipeline.generators.load.pipeline import load_denoisers

        cfg = tiny.config(tiny_sd3, generator={"quantize": "int8"}, rollout={"resources": {"GPU": 0}})
        loaded = load_denoisers(cfg.generator, torch.device("cpu"), torch.float32)["transformer"]
        planned = _weight_bytes(MetaPipeline(cfg.generator, torch.float32).modules["transformer"], cfg, "transformer")
        assert abs(planned / stored_bytes(loaded) - 1) < 0.02


def stored_bytes(module: torch.nn.Module) -> int:
    """With the parts that a quantised weight is made of."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        inner = [getattr(tensor, part) for part in parts] or [tensor]
        total += sum(t.numel() * t.element_size() for t in inner if isinstance(t, torch.Tensor))
    return total


def test_the_controller_is_planned_with_the_takes_it_writes():
    small = load_config(ROOT / "configs" / "quickstart.yaml", SMALL)
    large = load_config(ROOT / "configs" / "quickstart.yaml", [*SMALL, "generator.height=112", "generator.width=208"])
    assert memory_report.shown_takes(small) == 18
    small_base, large_base = (memory_report.base("controller", cfg, "WanPipeline") for cfg in (small, large))
    assert large_base > small_base + memory_report.shown_takes(large) * 9 * 112 * 208 * 3


def test_the_command_prints_roles_and_json(monkeypatch, capsys):
    monkeypatch.setattr(memory_report, "bases", lambda cfg, name: dict.fromkeys(NONE, 2**29))
    assert cli.main(["inspect", "--memory", "configs/quickstart-image.yaml", *SMALL, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["a_group"] == _rollout(load_config(Path("configs/quickstart-image.yaml"), SMALL), 0)[1]
    learner = plan["roles"]["learner"]
    weights = learner["parts"]["weights"]
    assert learner["parts"]["reference"] == weights and learner["parts"]["optimiser (two moments)"] > 1.9 * weights
    assert learner["host_bytes"] == sum(learner["parts"].values()) and plan["roles"]["rollout"]["processes"] == 2
    monkeypatch.setattr("pipeline.tools.memory.estimate.estimate_memory", lambda cfg, bases: plan)  # as just computed
    assert cli.main(["inspect", "--memory", "configs/quickstart-image.yaml", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "rollout x 2: " in out and "activations" in out and "object store: " in out and "together: " in out


def test_on_a_gpu_weights_leave_main_memory():
    cfg = load_config(ROOT / "configs" / "quickstart-image.yaml", [*SMALL, "learner.resources={CPU: 1, GPU: 1}"])
    learner = estimate_memory(cfg, NONE)["roles"]["learner"]
    assert learner["on"] == "cuda" and learner["device_bytes"] > learner["parts"]["weights"] > 0
    assert learner["host_bytes"] + learner["device_bytes"] == sum(learner["parts"].values())


def test_configs_that_are_not_here_are_asked_for(monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert cli.main(["inspect", "--memory", "configs/wan-14b.yaml"]) == 2
    assert "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers" in capsys.readouterr().err
    assert cli.main(["inspect"]) == 2
