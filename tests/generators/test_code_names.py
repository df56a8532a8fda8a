"""Names in a checkpoint's files never become code: each is refused by name before anything is imported."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fake_checkpoint import fake_config, make_checkpoint
from safetensors.numpy import save_file

from pipeline.core.code_names import check_lora_settings, component_class, pipeline_names
from pipeline.core.errors import InputError, RushesError
from pipeline.core.prompts import _default_sequence_length
from pipeline.generators.checkpoint_files import ADAPTER_FILE, LORA_FILE, check_diffusers_folder, check_lora
from pipeline.generators.load import pipeline
from pipeline.tools import preflight
from pipeline.tools.memory.meta_pipeline import MetaPipeline


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A folder on the module path, as one beside the checkout is, whose code must never run."""
    for name in ("evilpkg", "onnxruntime_evil"):
        (tmp_path / "beside" / name).mkdir(parents=True)
        code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    from_pretrained = staticmethod(print)\n"
        (tmp_path / "beside" / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "beside")
    monkeypatch.chdir(tmp_path / "beside")
    yield tmp_path
    assert not (tmp_path / "ran").exists() and "evilpkg" not in sys.modules


ENTRIES = [
    ("text_encoder", ["evilpkg", "Evil"]),
    ("transformer", ["evilpkg", "Evil"]),
    ("scheduler", ["evilpkg", "EvilScheduler"]),
    ("tokenizer", ["evilpkg", "EvilTokenizer"]),
    ("feature_extractor", ["evilpkg", "EvilProcessor"]),
    ("vae", ["evilpkg.sub", "Evil"]),
    ("vae", ["subprocess", "Popen"]),
    ("vae", ["diffusers.utils", "Evil"]),
    ("vae", ["..", "Evil"]),
    ("vae", ["diffusers", "utils.Evil"]),
    ("vae", ["diffusers", "_LazyModule"]),
    ("vae", ["diffusers", "DiffusionPipeline"]),  # would load a second model_index.json
    ("vae", ["transformers", "TextGenerationPipeline"]),
    ("vae", ["evilpkg", None]),
    ("vae", ["diffusers", "AutoencoderKL", "evilpkg"]),
    ("../vae", ["diffusers", "AutoencoderKL"]),
    ("_class_name", ["evilpkg", "Evil"]),
    ("_class_name", ["my_pipeline", "StableDiffusion3Pipeline"]),
    ("_class_name", "EvilPipeline"),
    ("_class_name", "utils"),
    ("_class_name", 3),
]


def changed(folder: Path, **entries) -> Path:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("names") / "sd3")


@pytest.fixture
def checkpoint(real, tmp_path):
    import shutil

    return shutil.copytree(real, tmp_path / "checkpoint")


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_every_way_to_load_refuses_foreign_names(trap, checkpoint, name, entry):
    cfg = tiny.config(changed(checkpoint, **{name: entry}))
    ways = [
        lambda: pipeline.load_pipeline(cfg.generator, torch.device("cpu")),
        lambda: pipeline.load_denoisers(cfg.generator, torch.device("cpu"), torch.float32),
        lambda: pipeline.load_component(cfg.generator, "vae", torch.float32),
        lambda: MetaPipeline(cfg.generator, torch.float32),
        lambda: check_diffusers_folder(checkpoint),
    ]
    for way in ways:
        with pytest.raises(RushesError) as caught:
            way()
        text = str(caught.value)
        assert "model_index.json" in text and name in text and "save_pretrained" in text and "\n" not in text
        assert "pip install" not in text and (str(entry)[:20] in text or str(entry[0]) in text)


def test_the_dry_run_refuses_them_too(trap):
    cfg = fake_config(trap)
    changed(trap / "model", text_encoder=["evilpkg", "Evil"])
    with pytest.raises(InputError, match="generator.pretrained: .*model_index.json.*'text_encoder'.*'evilpkg'"):
        preflight.check_all(cfg, dry=True)
    changed(trap / "model", text_encoder=["transformers", "CLIPTextModel"], _class_name="EvilPipeline")
    with pytest.raises(InputError, match="_class_name is 'EvilPipeline'"):
        preflight.check_all(cfg, dry=True)
    other = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"pipeline": "WanPipeline"})})
    preflight.check_all(other, dry=True)  # the file's own class is not used


@pytest.mark.parametrize("entry", ["ab", {"evilpkg": 1, "Evil": 2}, 7])
def test_what_stands_for_a_component_and_is_no_pair_is_refused(trap, checkpoint, entry):
    with pytest.raises(RushesError, match="model_index.json: vae is .*expected"):
        pipeline.load_pipeline(tiny.config(changed(checkpoint, vae=entry)).generator, torch.device("cpu"))


def test_code_inside_a_checkpoint_is_refused(trap, checkpoint):
    (checkpoint / "vae" / "diffusers.py").write_text(f"open({str(trap / 'ran')!r}, 'w')")
    for way in (
        check_diffusers_folder,
        lambda f: pipeline.load_pipeline(tiny.config(f).generator, torch.device("cpu")),
    ):
        with pytest.raises(InputError, match="vae/diffusers.py: code in a checkpoint is never run"):
            way(checkpoint)
    (checkpoint / "vae" / "diffusers.py").unlink()
    (checkpoint / "README.md").write_text("---\nprior:\n- somebody/else\n---\n")
    with pytest.raises(InputError, match="README.md: names another checkpoint"):
        check_diffusers_folder(checkpoint)


def test_a_processor_of_the_checkpoints_own_is_not_asked_for(trap, checkpoint, monkeypatch):
    """transformers would ask on the terminal for 15 s, and go on with 'y'."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    from transformers import AutoTokenizer

    from pipeline.rewards.models.pretrained import tokenizer

    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.Evil", None]}}
    (checkpoint / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (checkpoint / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "evil", **settings}))
    (checkpoint / "tokenizer" / "code.py").write_text(f"open({str(trap / 'ran')!r}, 'w')\nclass Evil: ...\n")
    with pytest.raises(InputError, match="tokenizer of"):
        tokenizer(str(checkpoint / "tokenizer"))
    pipeline.load_component(tiny.config(checkpoint).generator, "vae", torch.float32)
    with pytest.raises(ValueError):  # also where transformers itself loads it, inside a processor
        AutoTokenizer.from_pretrained(checkpoint / "tokenizer")


def test_classes_of_diffusers_and_transformers_pass(checkpoint):
    assert check_diffusers_folder(checkpoint)["vae"] == "AutoencoderKL"
    assert component_class("stable_diffusion", "StableDiffusionSafetyChecker", "x").__name__.endswith("SafetyChecker")
    assert component_class("transformers", "CLIPImageProcessor", "x") and "WanPipeline" in pipeline_names()
    for library, name in (("diffusers", "AutoModel"), ("transformers", "AutoTokenizer"), ("transformers", "pipeline")):
        with pytest.raises(InputError, match=f"{library} has no model.*{name}"):
            component_class(library, name, "x")


@pytest.mark.parametrize("name", [["a", "b"], 3, None, "utils", "__dict__"])
def test_a_pipelines_default_is_read_from_pipelines_only(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert _default_sequence_length(tmp_path) is None


# ------------------------------------------------------------------------------------------------------- LoRA

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "bias": "none", "use_qalora": False}
BAD_LORA = [
    {"megatron_config": {"x": 1}, "megatron_core": "evilpkg"},
    {"megatron_core": "evilpkg"},
    {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    {"corda_config": {"cache_file": "/etc/passwd"}},
    {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evilpkg"}},
    {"runtime_config": {"x": 1}},
]


@pytest.mark.parametrize("extra", BAD_LORA)
def test_lora_settings_that_name_more_than_a_lora_are_refused(tmp_path, extra):
    settings = {**LORA, **extra}
    with pytest.raises(InputError, match=f"adapter.*{list(extra)[0]}.*only|adapter.*megatron_core.*only"):
        check_lora_settings(settings, "adapter")
    weights = {"transformer.x.lora_A.weight": np.zeros((4, 4), np.float32)}
    flat = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_file(weights, tmp_path / LORA_FILE, metadata=flat)
    with pytest.raises(InputError, match=f"{LORA_FILE}: lora_adapter_metadata: transformer"):
        check_lora([tmp_path / LORA_FILE])
    save_file(weights, tmp_path / ADAPTER_FILE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="adapter_config.json"):
        check_lora([tmp_path / ADAPTER_FILE])


def test_plain_loras_pass(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]).save_pretrained(tmp_path)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / ADAPTER_FILE)
    check_lora([tmp_path / ADAPTER_FILE])
    mapping = {"base_model_class": "SD3Transformer2DModel", "parent_library": "diffusers.models.transformers"}
    check_lora_settings({**LORA, "auto_mapping": mapping}, "x")


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'evilpkg'"),
        ImportError("evil-pkg is needed. Run `pip install evil-pkg another`"),
        ImportError("This requires the evilpkg library but it was not found"),
    ],
)
def test_no_package_is_advised_that_the_libraries_do_not_know(error):
    text = str(pipeline._explain(tiny.config(Path("nowhere")).generator, error))
    assert pipeline.missing_package(error) is None and "pip install" not in text


def test_a_kernel_of_the_hub_is_refused(tmp_path):
    from transformers import CLIPModel

    from pipeline.rewards.models.pretrained import pretrained

    folder = make_checkpoint(tmp_path / "model")
    for key in ("attn_implementation", "_attn_implementation"):
        (folder / "text_encoder" / "config.json").write_text(json.dumps({"text_config": {key: "somebody/kernel"}}))
        with pytest.raises(InputError, match=f"config.json: {key} is 'somebody/kernel'.*sdpa"):
            check_diffusers_folder(folder)
        with pytest.raises(InputError, match="somebody/kernel"):
            pretrained(CLIPModel, str(folder / "text_encoder"), torch.device("cpu"), torch.float32)
