"""Runs a pipeline's own `__call__` without its denoisers, and without what hides gradients from its caller.

Everything else of the pipeline runs as it is, so that the denoiser inputs of any step, or its decoding, can be had
without denoising.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch

from pipeline.core.tensors import map_leaves


class StandIns:
    """Stand-ins for modules' methods, which return at once what the method gave when first called with these shapes."""

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}  # by the method and the shapes of a call

    @contextmanager
    def in_place_of(
        self,
        modules: dict[str, torch.nn.Module],
        method: str = "forward",
        active: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        """Within the context, `method` of the modules is stood in for while `active()` is true."""
        before = {name: module.__dict__.get(method) for name, module in modules.items()}
        for name, module in modules.items():
            module.__dict__[method] = self._remembering(f"{name}.{method}", getattr(module, method), active)
        try:
            yield
        finally:
            for name, module in modules.items():
                module.__dict__.pop(method)
                if before[name] is not None:
                    module.__dict__[method] = before[name]

    def _remembering(self, name: str, method: Callable[..., Any], active: Callable[[], bool]) -> Callable[..., Any]:
        @functools.wraps(method)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if not active():
                return method(*args, **kwargs)
            shapes: list[Any] = [name]
            map_leaves(lambda path, leaf: shapes.append((path, getattr(leaf, "shape", None))), [args, kwargs])
            key = repr(shapes)
            if key not in self._outputs:
                with torch.no_grad():
                    self._outputs[key] = method(*args, **kwargs)
            return self._outputs[key]

        return stand_in


@contextmanager
def undecorated_methods(pipe: Any) -> Iterator[None]:
    """Within the context, the class's own methods run without `no_grad` decorators and prompt caches."""
    cls, before = type(pipe), dict(pipe.__dict__)
    for name in dir(cls):
        if name.startswith("__"):
            continue
        method = inspect.getattr_static(cls, name)
        if isinstance(method, FunctionType) and (hasattr(method, "__wrapped__") or name in before):
            pipe.__dict__[name] = MethodType(inspect.unwrap(method), pipe)
    try:
        yield
    finally:
        for name in pipe.__dict__.keys() - before.keys():
            if isinstance(pipe.__dict__[name], MethodType):
                del pipe.__dict__[name]
        pipe.__dict__.update({name: value for name, value in before.items() if callable(value)})


def undecorated_call(pipe: Any, **kwargs: Any) -> Any:
    """The pipeline's `__call__` without its `no_grad`."""
    return inspect.unwrap(type(pipe).__call__)(pipe, **kwargs)
