"""What cannot be a policy is refused with one message that says what was found; `rushes inspect` and its exit codes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import families
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.models import attention_processor
from families import edit as families_edit
from families import image as families_image
from families import language_model
from families import video as videos

from jobs.cli import main
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import StepGuidance
from pipeline.generators.load import pipeline
from pipeline.generators.policy import Policy
from pipeline.generators.policy_pipeline import PolicyPipeline
from pipeline.rl.group_plan import train_work


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def sd(root):
    return families.make("StableDiffusion", root)


def policy_with(change, name: str = "StableDiffusion", folder=None, **sections) -> Policy:
    policy = families.policy(name, folder, **sections)
    change(policy.pipe)
    return policy


def test_momentum_guidance_is_refused(sd, monkeypatch):
    """A stateful guider: what it adds depends on the steps before."""
    policy = families.policy("StableDiffusion", sd)
    forward = policy.pipe.unet.forward
    memory = {"last": 0.0}

    def with_memory(*args, **kwargs):
        kwargs["return_dict"] = False
        out = forward(*args, **kwargs)[0]
        memory["last"] = 0.5 * memory["last"] + out.mean()
        return (out + memory["last"],)

    monkeypatch.setattr(policy.pipe.unet, "forward", with_memory)
    with pytest.raises(UnsupportedPolicyError, match="state between calls"):
        policy.probe(families.prompts("StableDiffusion", sd))


class Blurred(attention_processor.AttnProcessor):
    """A processor that only this file knows."""


def test_processors_put_in_place_while_sampling_must_be_known(sd, monkeypatch):
    """Perturbed-attention guidance is replayed with diffusers' own processors (test_families); these cannot be."""
    policy = families.policy("StableDiffusion", sd)
    own = policy.pipe.encode_prompt

    def encode(*args, **kwargs):
        policy.pipe.unet.set_attn_processor(Blurred())
        return own(*args, **kwargs)

    monkeypatch.setattr(policy.pipe, "encode_prompt", encode)
    with pytest.raises(UnsupportedPolicyError, match="attention processor Blurred, installed while sampling"):
        policy.probe(families.prompts("StableDiffusion", sd))


class Squashed(StableDiffusionPipeline):
    """Guidance that is no known rule: the scheduler is given a squashed value."""

    def progress_bar(self, *args, **kwargs):
        step = self.scheduler.step
        self.scheduler.step = lambda out, *a, **k: step(out.tanh() * out.std(), *a, **k)
        return super().progress_bar(*args, **kwargs)


def test_unknown_guidance_is_refused_with_numbers(sd):
    policy = families.policy("StableDiffusion", sd)
    policy.pipe.__class__ = Squashed
    with pytest.raises(UnsupportedPolicyError, match=r"no guidance rule.*closest: cfg.*\d"):
        policy.probe(families.prompts("StableDiffusion", sd))


@pytest.mark.parametrize("share", [0.0, 1e-6])
def test_the_rule_is_found_where_the_text_changes_next_to_nothing(sd, share):
    """Weights that were never trained: any rule and scale would fit the denoiser's own outputs."""

    def deaf(pipe):
        for name, parameter in pipe.unet.named_parameters():
            if "attn2.to_v" in name:
                parameter.data.mul_(share)

    policy = policy_with(deaf, folder=sd)
    report = policy.probe(families.prompts("StableDiffusion", sd))
    assert report["alike_outputs"] and report["guidance_rule"] == "cfg uncond-first"
    work = train_work(policy.cfg, 0, 0, families.prompts("StableDiffusion", sd)[0])
    steps = policy.rollout(work)[1].parts[0].steps
    assert {step.guidance for step in steps} == {StepGuidance("cfg uncond-first", 3.0)}


def test_a_fixed_number_of_steps_is_refused(sd, monkeypatch):
    """A model distilled to one step takes it whatever it is asked for."""
    policy = families.policy("StableDiffusion", sd)
    grid = policy.pipe.scheduler.set_timesteps
    monkeypatch.setattr(policy.pipe.scheduler, "set_timesteps", lambda n, device=None: grid(1, device=device))
    with pytest.raises(UnsupportedPolicyError, match="took 1 scheduler steps where 3 were asked for"):
        policy.probe(families.prompts("StableDiffusion", sd))


def test_inputs_that_cannot_be_recorded_are_refused(sd, monkeypatch):
    policy = families.policy("StableDiffusion", sd)
    with pytest.raises(UnsupportedPolicyError, match="of type object, which cannot be recorded"):
        policy.cfg.generator.call_kwargs["cross_attention_kwargs"] = {"cache": object()}
        policy.probe(families.prompts("StableDiffusion", sd))


def test_a_scheduler_without_counterpart_is_refused_by_inspect(root, capsys):
    torch.manual_seed(0)
    folder = root / "svd"
    videos.stable_video_diffusion().save_pretrained(folder)
    assert main(["inspect", str(folder), "--device", "cpu"]) == 1
    assert "no first-order counterpart" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDIMScheduler])
def test_other_schedulers_are_swapped_for_ddim(sd, scheduler):
    policy = policy_with(lambda pipe: None, folder=sd)
    pipe = policy.pipe
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    again = Policy(PolicyPipeline(policy.cfg, pipe, policy.device))
    assert type(pipe.scheduler) is DDIMScheduler
    assert again.probe(families.prompts("StableDiffusion", sd))["guidance_error"] <= 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchLCMScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        LTXEulerAncestralRFScheduler(),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_schedulers_that_draw_noise_or_call_twice_take_plain_steps(root, scheduler):
    """The probe compares the first step without noise with the scheduler's own."""
    folder = families.make("StableDiffusion3", root)
    pipe = families.policy("StableDiffusion3", folder).pipe
    pipe.scheduler = scheduler
    policy = Policy(PolicyPipeline(families.config("StableDiffusion3", folder), pipe, torch.device("cpu")))
    assert policy.probe()["guidance_error"] <= 1e-5


def test_steps_that_change_the_latents_size_are_refused(root):
    folder = families.make("StableDiffusion3", root)
    pipe = families.policy("StableDiffusion3", folder).pipe
    pipe.scheduler = FlowMatchLCMScheduler(scale_factors=[0.5, 1.0])
    with pytest.raises(UnsupportedPolicyError, match="scale_factors changes the latents' size"):
        Policy(PolicyPipeline(families.config("StableDiffusion3", folder), pipe, torch.device("cpu")))


def test_inspect_reports_in_words_and_json(sd, capsys):
    assert main(["inspect", str(sd), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for part in (
        "UNet2DConditionModel",
        "uncond + g (cond - uncond) with g = 7.5",
        "LoRA of rank 16",
        "can be trained",
    ):
        assert part in text
    assert main(["inspect", str(sd), "--json", "--guidance-scale", "1", "--height", "16", "--width", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable"] and report["scheduler"]["prediction"] == "epsilon" and report["lora"]["parameters"] > 0
    assert report["probed_with"]["height"] == 16 and report["probe"]["replay_whole"] <= 1e-5
    assert main(["inspect", str(sd), "--call", "nonsense"]) == 2


def test_inspect_makes_up_images(root, capsys):
    torch.manual_seed(0)
    folder = root / "inpaint"
    families_image.inpaint().save_pretrained(folder)
    assert main(["inspect", str(folder), "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["probe"]["conditions"] == ["image", "mask_image"] and report["probe"]["chosen_share"] < 1


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (
            ImportError("`cosmos_guardrail` is not installed. Please install it: `pip install cosmos_guardrail`."),
            "cosmos_guardrail",
        ),
        (ImportError("AutoVideoProcessor requires the Torchvision library but it was not found"), "torchvision"),
        (ModuleNotFoundError("No module named 'timm.models'"), "timm"),
        (NameError("name 'OmniGenMultiModalProcessor' is not defined"), "torchvision"),
        (ValueError("pip install nothing"), None),
    ],
)
def test_a_missing_package_is_named(error, package, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    assert pipeline.missing_package(error) == package
    config = tiny.config(Path("nowhere")).generator
    told = str(pipeline._explain(config, error))
    assert (f"pip install {package} (" in told) if package else ("needs model_index.json" in told)


# -- found on checkpoints that are saved and inspected as a user would ----------------------------------------------


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (families_edit.amused, ["AmusedScheduler", "no first-order counterpart"]),
        pytest.param(
            language_model.hunyuan_image,
            ["AdaptiveProjectedMixGuidance changes its rule", "sampler.window.range="],
            marks=pytest.mark.slow,
        ),
        (families_edit.skyreels_diffusion_forcing, ["none of its steps through pipe.scheduler", "no log-prob"]),
    ],
)
def test_families_that_are_refused(build, says, root, capsys):
    torch.manual_seed(0)
    folder = root / build.__name__
    pipe = build()
    families.liven(pipe)
    pipe.save_pretrained(folder)
    assert main(["inspect", str(folder), "--device", "cpu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["trainable"] and all(part in report["reason"] for part in says), report["reason"]


def test_a_scheduler_called_in_an_unknown_way_is_refused(root, monkeypatch):
    """The first step without noise is compared with the scheduler's own: here the pipeline means the other sign."""
    folder = families.make("Flux", root)
    policy = families.policy("Flux", folder)
    own = type(policy.pipe.scheduler).step

    @functools.wraps(own)
    def negated(self, model_output, *args, **kwargs):
        return own(self, -model_output, *args, **kwargs)

    monkeypatch.setattr(type(policy.pipe.scheduler), "step", negated)
    with pytest.raises(UnsupportedPolicyError, match=r"first step without noise differs .* by \d"):
        policy.probe(families.prompts("Flux", folder))


def test_a_denoising_strength_that_is_rounded_otherwise_still_gives_the_steps_asked_for(root):
    """Chroma's image-to-image takes 4 steps where int(4 x 0.9) would be 3."""
    folder = families.make("ChromaImg2Img", root)
    policy = families.policy("ChromaImg2Img", folder)
    report = policy.probe(families.prompts("ChromaImg2Img", folder))
    assert report["replay_whole"] <= 1e-5 and policy.plan.steps_to_request == {3: 3}


def test_a_checkpoint_without_an_optional_encoder_loads(root):
    """SD3 is often saved without its T5; plain diffusers then wants to be told so."""
    torch.manual_seed(0)
    parts = {**families_image.sd3().components, "text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline(**parts).save_pretrained(root / "no-t5")
    policy = families.policy("StableDiffusion3", root / "no-t5")
    assert policy.pipe.text_encoder_3 is None and policy.probe()["guidance_error"] <= 1e-5
