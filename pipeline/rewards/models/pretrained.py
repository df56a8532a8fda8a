"""Weights of reward models: a hub id or a local folder, safetensors only, and no weight silently left random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.messages import show
from pipeline.core.code_names import check_kernels
from pipeline.core.errors import ConfigError, InputError, one_line
from pipeline.core.files import did_you_mean
from pipeline.core.library_messages import silence_libraries
from pipeline.core.reading import read_json_object
from pipeline.core.safe_paths import relative_name
from pipeline.generators.checkpoint_files import read_json

if TYPE_CHECKING:
    import torch


def check_choice(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(
            f"{key}: found {show(value)}{did_you_mean(value, allowed)}; expected one of {', '.join(allowed)}"
        )
    return value


def check_batch(batch: Any, key: str = "batch", least: int = 1) -> int:
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < least:
        raise ConfigError(f"{key}: found {show(batch)}; expected a whole number of at least {least}")
    return batch


def check_number(key: str, value: Any, low: float = float("-inf"), high: float = float("inf")) -> float:
    """A finite number in [low, high], or `ConfigError`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high
        or value
        in (
            float("inf"),
            float("-inf"),
        )
    ):
        bounds = "" if (low, high) == (float("-inf"), float("inf")) else f" from {low:g} to {high:g}"
        raise ConfigError(f"{key}: found {show(value)}; expected a number{bounds}")
    return float(value)


def pretrained(
    cls: Any, model: str, device: torch.device, dtype: torch.dtype, unused: str | None = None, **kwargs: Any
) -> Any:
    """`cls.from_pretrained` for scoring: eval mode, no gradients, on `device`. `unused`: a part that may be missing.

    Raises `InputError` if nothing loads, if the weights are pickled, or if the checkpoint lacks some of the model's
    weights (transformers would leave them random and only warn).
    """
    from transformers.utils import logging

    silence_libraries()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # silences its table of unused weights; missing ones are checked below
    try:
        where = None if "state_dict" in kwargs else model
        _check_names(model)
        loaded, info = cls.from_pretrained(
            where, use_safetensors=True, dtype=dtype, output_loading_info=True, trust_remote_code=False, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"reward model {model}: {one_line(error)}; {_wanted(model)}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(k for k in info["missing_keys"] if not (unused and k.startswith(unused)))
    if missing:
        raise InputError(
            f"reward model {model}: {len(missing)} of {cls.__name__}'s weights are not in the checkpoint "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); it is another kind of model"
        )
    return loaded.eval().requires_grad_(False).to(device)


def _check_names(model: str) -> None:
    """Raises `InputError` where a local checkpoint's config names a kernel of the hub."""
    file = Path(model) / "config.json"
    if file.exists():
        check_kernels(read_json(file), file)


def pretrained_config(cls: Any, model: str) -> Any:
    """The checkpoint's config as a `cls`. Raises `InputError`."""
    try:
        config, _ = cls.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise InputError(f"reward model {model}: {one_line(error)}; {_wanted(model)}") from error
    if config.get("model_type") != cls.model_type:
        raise InputError(f"reward model {model}: found a {config.get('model_type')} model; expected {cls.model_type}")
    return cls.from_dict(config)


def tokenizer(model: str) -> Any:
    """The checkpoint's own tokenizer. Raises `InputError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the tokenizer classes raise anything from KeyError to their own Rust exceptions
        raise InputError(f"tokenizer of {model}: {one_line(error)}; {_wanted(model)}") from error


def image_processor(model: str) -> Any:
    """The checkpoint's own image preprocessing, on PIL (torchvision is not needed). Raises `InputError`."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
    except Exception as error:  # as with tokenizers: a broken JSON, a missing class, a missing file
        raise InputError(f"image processor of {model}: {one_line(error)}; {_wanted(model)}") from error


def weight_file(model: str, name: str | None = None, suffix: str = ".safetensors") -> Path:
    """A file of weights: a local file, the one in a local folder, or `owner/repo/file` on the hub."""
    path = Path(model)
    if path.is_file():
        if path.suffix != suffix:
            raise InputError(f"{model}: weights must be a {suffix} file (pickled weights can run code)")
        return path
    if path.is_dir():
        files = [path / name] if name else sorted(path.glob(f"*{suffix}"))
        if len(files) != 1 or not files[0].is_file():
            present = ", ".join(f.name for f in sorted(path.glob("*"))) or "nothing"
            raise InputError(f"{model}: expected one {suffix} file there, found {present}")
        return files[0]
    parts = model.split("/")
    if len(parts) >= 3 and parts[0] not in ("", ".", "..", "~") and parts[-1].endswith(suffix):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        except Exception as error:  # the hub client raises its own tree of errors, and those of its HTTP library
            raise InputError(f"weights {model}: {one_line(error)}") from error
    raise InputError(f"weights {model}: no such file; give a {suffix} file or owner/repo/file{suffix}")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def read_tensors(model: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint (folder or hub id) whose names begin so, from all its files; {} if there are none."""

    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    def file(name: str, must: bool = True) -> str | None:
        return cached_file(model, name, _raise_exceptions_for_missing_entries=must)

    try:
        index = file("model.safetensors.index.json", must=False)
        if index:
            places = read_json_object(Path(index), "copy the checkpoint again", lenient=True)["weight_map"]
            names = sorted({place for name, place in places.items() if name.startswith(prefix)})
            for name in names:
                relative_name(name, str(index), "copy the checkpoint again")
        else:
            names = ["model.safetensors"]
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            with safe_open(file(name), "pt") as weights:
                tensors |= {key: weights.get_tensor(key) for key in weights.keys() if key.startswith(prefix)}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"weights of {model}: {one_line(error)}; {_wanted(model)}") from error
    return tensors


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _wanted(model: str) -> str:
    if Path(model).exists():
        return "expected a transformers folder with config.json, model.safetensors and the tokenizer's files"
    return "expected a local folder or a hub id that can be reached from here"
