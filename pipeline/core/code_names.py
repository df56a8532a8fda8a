"""Names in a checkpoint's files that become code: classes in model_index.json, settings of a LoRA, kernels.

A checkpoint is somebody else's data. Only classes of diffusers and transformers are allowed in it, looked up by name in
those two libraries; an entry that names another module, a Python file or a hub kernel is refused before any import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError

LIBRARIES = ("diffusers", "transformers")
_BASES = {  # library -> base classes of allowed components
    "diffusers": ("ModelMixin", "SchedulerMixin", "BaseGuidance"),
    "transformers": (
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "FeatureExtractionMixin",
        "ProcessorMixin",
        "ImageProcessingMixin",
    ),
}
_FIX = "use a checkpoint that diffusers' save_pretrained has written from its own classes"
# The settings that say how a LoRA's weights are applied. All others must have PEFT's defaults: some of them name
# modules that PEFT imports, or files that it reads.
_LORA_SETTINGS = (
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "peft_type",
    "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
)  # fmt: skip
_LORA_DEFAULTS = {  # settings with a default other than null, false or empty
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config")


def check_model_index(index: Mapping[str, Any], file: str | Path, own_class: bool = True) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of model_index.json, all of them of diffusers or transformers. Imports nothing.

    `own_class`: whether the pipeline class that the file names will be used. Raises `InputError` naming the file and
    the entry.
    """
    cls = index.get("_class_name")
    if own_class and (not isinstance(cls, str) or cls not in pipeline_names()):
        raise InputError(
            f"{file}: _class_name is {_shown(cls)}; only pipeline classes of diffusers are allowed, and no code of the "
            f"checkpoint's own is run; {_FIX}, or set generator.pipeline"
        )
    components = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or not any(isinstance(e, str) for e in entry):
            continue  # an option, or a component that was saved as absent
        library, kind = (*entry, None, None)[:2]
        named = isinstance(library, str) and isinstance(kind, str) and len(entry) == 2
        if not (named and kind.isidentifier() and not kind.startswith("_") and "Pipeline" not in kind):
            raise InputError(f"{file}: {_shown(name)} is {_shown(entry)}; expected [library, class]; {_FIX}")
        if library not in LIBRARIES and library not in _pipeline_folders():
            raise InputError(
                f"{file}: {_shown(name)} is of the library {_shown(library)}; only classes of diffusers and "
                f"transformers are allowed, others are never imported; {_FIX}"
            )
        if not name.isidentifier():
            raise InputError(f"{file}: {_shown(name)} cannot be a component's name; {_FIX}")
        components[name] = (library, kind)
    return components


def check_own_code(folder: Path, components: Mapping[str, tuple[str, str]]) -> None:
    """Refuses Python files that diffusers would import as a component's library, and a second checkpoint named in the
    model card.

    Raises `InputError`.
    """
    card = folder / "README.md"
    if card.is_file() and re.search(r"^prior\s*:", card.read_text("utf-8", "replace"), re.MULTILINE):
        raise InputError(
            f"{card}: names another checkpoint to load (prior); only the folder's own components are allowed; save all "
            "of them in one folder, and remove that line"
        )
    for name, (library, _) in components.items():
        file = folder / name / f"{library}.py"
        if file.exists():
            raise InputError(f"{file}: code in a checkpoint is never run; remove the file, or {_FIX}")


def component_class(library: str, name: str, where: str) -> Any:
    """The class of a checked entry. Raises `InputError` for a name that is no model, scheduler, tokenizer or
    processor."""
    home = importlib.import_module(library if library in LIBRARIES else f"diffusers.pipelines.{library}")
    kind = getattr(home, name, None)
    if isinstance(kind, type) and hasattr(kind, "_backends"):
        return kind  # a placeholder for a class whose packages are missing, which raises when it is used
    bases = tuple(base for lib, names in _BASES.items() for base in _named(lib, names))
    if not (isinstance(kind, type) and issubclass(kind, bases) and kind.__module__.split(".")[0] in LIBRARIES):
        raise InputError(f"{where}: {library} has no model, scheduler, tokenizer or processor {_shown(name)}; {_FIX}")
    return kind


def _named(library: str, names: Iterable[str]) -> list[type]:
    home = importlib.import_module(library)
    kinds = [getattr(home, name, None) for name in names]
    return [kind for kind in kinds if isinstance(kind, type) and not hasattr(kind, "_backends")]


@functools.cache
def pipeline_names() -> frozenset[str]:
    """diffusers' pipeline classes, read from its __init__ without importing it."""
    spec = importlib.util.find_spec("diffusers")
    source = Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
    return frozenset(re.findall(r'"(\w*Pipeline\w*)"', source)) - {"DiffusionPipeline"}


@functools.cache
def _pipeline_folders() -> frozenset[str]:
    """Modules of diffusers.pipelines. Some checkpoints name a class of their pipeline's module, such as
    ["stable_diffusion", "StableDiffusionSafetyChecker"]."""
    spec = importlib.util.find_spec("diffusers")
    root = Path(spec.origin).parent / "pipelines" if spec and spec.origin else Path("/nonexistent")
    return frozenset(path.parent.name for path in root.glob("*/__init__.py"))


def check_lora_settings(settings: Any, where: str) -> None:
    """Checks an adapter_config.json, or the metadata of a LoRA's weights. Raises `InputError`."""
    fix = "use a LoRA that was exported by Rushes, or saved by diffusers or PEFT with plain LoRA settings"
    if not isinstance(settings, dict):
        raise InputError(f"{where}: found {_shown(settings)}; expected a LoRA's settings; {fix}")
    for path, value in settings.items():
        key = str(path).rpartition(".")[2]  # diffusers writes "transformer.lora_alpha"
        if key == "peft_type" and value != "LORA":
            raise InputError(f"{where}: {path} is {_shown(value)}; only LORA is allowed; {fix}")
        plain = value in (None, False, "", [], {}) or value == _LORA_DEFAULTS.get(key)
        if key == "auto_mapping" and isinstance(value, dict):  # the wrapped class, which nothing looks up
            plain = str(value.get("parent_library")).split(".")[0] in LIBRARIES
        if key not in _LORA_SETTINGS and not plain:
            raise InputError(f"{where}: {path} is {_shown(value)}; only settings of plain LoRA are allowed; {fix}")


def check_kernels(config: Any, file: str | Path) -> None:
    """Refuses a config that names a kernel of the hub, which transformers would fetch and run. Raises `InputError`."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in _KERNEL_KEYS and "/" in str(value):
            raise InputError(
                f"{file}: {key} is {_shown(value)}; only transformers' own implementations are allowed, such as sdpa; "
                "remove the key"
            )
        check_kernels(value, file)


def never_ask_to_run_code() -> None:
    """Stops transformers from asking on the terminal whether to run a checkpoint's code, and waiting for the answer."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def _shown(value: Any) -> str:
    return repr(value)[:80]
