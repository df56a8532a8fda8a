"""A pipeline without weights: it runs its own code on real (zero) latents, while its networks return only the shapes of
their outputs and count the bytes they would hold. So a checkpoint's memory is known before any weights are loaded.

Networks are built from their configs as torch fake tensors, which have shapes and dtypes and no data. The pipeline's
own code between them, which looks at values, sees real zeros of the right shapes.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.config.schema import GeneratorConfig
from pipeline.core.code_names import check_model_index, check_own_code, component_class, never_ask_to_run_code
from pipeline.core.errors import InputError, RushesError, one_line
from pipeline.core.library_messages import silence_libraries
from pipeline.generators.checkpoint_files import DENOISERS, read_json
from pipeline.generators.load.processors import processors_without_torchvision


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within the block that are still held (`live`), and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf.untyped_storage())
        return out

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Tensors that are there already, of which views may be made."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(slots=True)
class Call:
    """One call of a network: its inputs, as the pipeline gave them, before sampler step `step` was taken."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


class MetaPipeline:
    """The pipeline of a checkpoint, with networks that hold no data.

    `peaks`: component -> most bytes live in one of its calls. `calls`: the denoisers' calls of the last run;
    `encodings`: those of the text encoders; `decodings`: of the VAE's decoder.
    """

    def __init__(self, cfg: GeneratorConfig, dtype: torch.dtype) -> None:
        self.cfg, self.dtype = cfg, dtype
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.folder = configs_folder(cfg)
        self.peaks: dict[str, int] = defaultdict(int)
        self.calls: list[Call] = []
        self.encodings: list[Call] = []
        self.decodings: list[Call] = []
        self.steps = 0
        self._inside = False
        self.sample: torch.Tensor | None = None  # what the scheduler was given last
        self.modules: dict[str, torch.nn.Module] = {}
        self.pipe = self._pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self._watch(self.pipe.scheduler)
        for name, module in self.modules.items():
            for method in ("forward", "encode", "decode", "get_image_features", "get_text_features"):
                if callable(getattr(module, method, None)):
                    setattr(module, method, self._stub(name, module, method))

    def reset(self) -> None:
        """Forgets the calls of an earlier run."""
        self.calls.clear()
        self.encodings.clear()
        self.decodings.clear()
        self.steps, self.sample = 0, None

    def _watch(self, scheduler: Any) -> None:
        original = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.sample = inspect.signature(original).bind(*args, **kwargs).arguments["sample"]
            self.steps += 1
            return original(*args, **kwargs)

        step.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        scheduler.step = step

    def _pipeline(self) -> Any:
        """The pipeline of networks without data, and of tokenizers and schedulers as they are."""
        import diffusers
        import transformers  # noqa: F401 (so that its messages are silenced too)

        silence_libraries()
        file = self.folder / "model_index.json"
        index = read_json(file)
        components = check_model_index(index, file, own_class=self.cfg.pipeline is None)
        check_own_code(self.folder, components)
        never_ask_to_run_code()
        given: dict[str, Any] = processors_without_torchvision(index, str(self.folder))
        for name, entry in index.items():
            if name.startswith("_") or name in given:
                continue
            if name not in components:
                given[name] = None if entry == [None, None] else entry  # an option, such as boundary_ratio
                continue
            kind = component_class(*components[name], f"{file}: {name}")
            if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
                given[name] = self.modules[name] = self._network(kind, self.folder / name)
            else:
                given[name] = kind.from_pretrained(str(self.folder / name))
        cls: Any = getattr(diffusers, pipeline_name(self.cfg), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            raise CannotEstimate(f"{self.folder}: diffusers has no pipeline class {pipeline_name(self.cfg)}")
        names = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
        return cls(**{name: value for name, value in given.items() if name in names})

    def _network(self, kind: type[torch.nn.Module], folder: Path) -> torch.nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # fake parameters cannot be converted afterwards
        try:
            with self.mode, torch.no_grad():
                return _from_config(kind, folder).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def _stub(self, name: str, module: torch.nn.Module, called: str) -> Callable[..., Any]:
        method = getattr(module, called)

        def stub(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            try:
                with self.mode, AllocatedBytes() as live:
                    live.ignore(iter(module.state_dict(keep_vars=True).values()))
                    out = method(*self._fake(args), **self._fake(kwargs))
            finally:
                self._inside = False
            self.peaks[name] = max(self.peaks[name], live.peak)
            if name == "vae" and called == "decode":
                self.decodings.append(Call(name, args, kwargs, self.steps))
            if name in DENOISERS or name.startswith("text_encoder"):
                calls = self.calls if name in DENOISERS else self.encodings
                calls.append(Call(name, args, kwargs, self.steps))
            return _real(out)

        stub.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        return stub

    def _fake(self, tree: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t if isinstance(t, FakeTensor) else self.mode.from_tensor(t), tree)

    @contextmanager
    def training(self, calls: list[Call], live_inputs: bool = False) -> Iterator[tuple[AllocatedBytes, list[Any]]]:
        """Runs calls with gradients on, then the backward pass; yields the counter after the forward pass and runs the
        backward pass when the block ends. Trained parameters are those that require gradients. `live_inputs`: so do
        the inputs, but for the sample (a denoiser whose text encoders are trained)."""
        tail = self.sample.shape[1:] if self.sample is not None else None

        def given(tree: Any) -> Any:
            fake = self._fake(tree)
            for leaf in tree_leaves(fake) if live_inputs else []:
                if isinstance(leaf, FakeTensor) and leaf.is_floating_point() and leaf.shape[1:] != tail:
                    leaf.requires_grad_()
            return fake

        self._inside = True
        try:
            with self.mode, AllocatedBytes() as live:
                for module in self.modules.values():
                    live.ignore(iter(module.state_dict(keep_vars=True).values()))
                outs = [self.modules[call.module](*given(call.args), **given(call.kwargs)) for call in calls]
                tensors = [next(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)) for out in outs]
                yield live, tensors
                torch.stack([t.float().square().mean() for t in tensors]).sum().backward()
        finally:
            self._inside = False

    def decoding_bytes(self, takes: int) -> int:
        """Peak bytes of decoding one of the `takes` takes of the last run with gradients to its latents."""
        if not self.decodings:
            return 0
        call = self.decodings[0]
        latents, *rest = call.args if call.args else [call.kwargs["z"]]
        kwargs = {name: value for name, value in call.kwargs.items() if name != "z"}
        self._inside = True
        try:
            with self.mode, AllocatedBytes() as live:
                vae = self.modules["vae"]
                live.ignore(iter(vae.state_dict(keep_vars=True).values()))
                entries = max(1, latents.shape[0] // takes)  # more than one where frames are decoded one by one
                given = self._fake(latents[:entries]).requires_grad_()
                out = vae.decode(given, *self._fake(rest), **self._fake(kwargs))  # type: ignore[operator]
                first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
                first.float().square().mean().backward()
        finally:
            self._inside = False
        return live.peak


def _from_config(kind: type[torch.nn.Module], folder: Path) -> torch.nn.Module:
    """A network from its config alone."""
    if hasattr(kind, "load_config") and hasattr(kind, "from_config"):  # diffusers
        return kind.from_config(kind.load_config(str(folder)))
    config = kind.config_class.from_pretrained(str(folder))  # type: ignore[attr-defined]
    # Not in the dtype that the config was saved with.
    return kind._from_config(config, dtype=torch.get_default_dtype())  # type: ignore[attr-defined]


def _real(tree: Any) -> Any:
    """Real zeros in place of the fake tensors of an output, also inside a distribution over latents."""

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return zeros(leaf)
        if type(leaf).__name__.endswith("Distribution"):
            made = copy.copy(leaf)
            for key, value in vars(leaf).items():
                if isinstance(value, torch.Tensor):
                    setattr(made, key, zeros(value))
            return made
        return leaf

    return torch.utils._pytree.tree_map(one, tree)


def pipeline_name(cfg: GeneratorConfig) -> str:
    """The diffusers class that the checkpoint is called through."""
    return cfg.pipeline or str(read_json(configs_folder(cfg) / "model_index.json")["_class_name"])


def configs_folder(cfg: GeneratorConfig) -> Path:
    """The checkpoint's folder, or the snapshot of a hub id (its configs and tokenizers alone are fetched).

    Raises InputError when it is neither here nor can be fetched.
    """
    folder = Path(cfg.pretrained).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model", "*.jinja"]
    for local in (True, False):
        try:
            return Path(
                snapshot_download(cfg.pretrained, revision=cfg.revision, allow_patterns=small, local_files_only=local)
            )
        except Exception as error:  # the hub's own errors, the network's, a name that is no hub id
            cause = one_line(error, 160)
    raise InputError(
        f"generator.pretrained: the configs of {cfg.pretrained!r} are not here and could not be fetched ({cause}); "
        f"memory is planned from them: hf download {cfg.pretrained} --include '*.json' '*.txt' '*.model'"
    )


def weight_bytes_of(module: torch.nn.Module) -> int:
    """Bytes of a network's parameters and buffers, tied ones once."""
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


class CannotEstimate(RushesError):
    """The pipeline could not be run without weights; the message says where."""
