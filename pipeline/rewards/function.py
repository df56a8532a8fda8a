"""A reward from the user's own file: `scorer: my_rewards.py:redness`.

    def redness(frames, prompt):                     # uint8 [F, H, W, 3] (F = 1 unless it reads videos), text
        red, green, blue = frames.mean(axis=(0, 1, 2)) / 255
        return red - (green + blue) / 2              # one finite number; higher is better

On videos such a function is applied to single frames, segment by segment. What may be added:

    def redness(frames, prompt, metadata): ...       # a third parameter gets the prompt's metadata
    redness.reads = "video"                          # the whole clip at once; a parameter `fps` gets its frame rate
    redness.batched = True                           # frames [K, F, H, W, 3], lists of K prompts (and metadata) -> [K]

Further parameters are options, set by `rewards.<name>.args`. A reward that cannot score must raise: the group is
retried and never scored 0.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer

_EXTRAS = ("metadata", "fps")


def is_function_spec(scorer: str) -> bool:
    """Whether a config's `scorer` names a file rather than a registered scorer."""
    return ".py" in scorer or "/" in scorer


def load_function(spec: str) -> Callable[..., Any]:
    """Imports `file.py:function`. Raises `ConfigError` naming file, line and fix."""
    file, colon, name = spec.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"scorer {spec!r}: write it as file.py:function")
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(
            f"scorer {spec!r}: {path} is not there{did_you_mean(path.name, neighbours) or '; check the path'}"
        )
    try:
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    except SyntaxError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: syntax error in the reward file ({error.msg}); correct that line"
        ) from None
    except (UnicodeDecodeError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: the reward file cannot be read ({error})") from None
    module = types.ModuleType(f"rushes_user_{path.stem}")
    module.__file__ = str(path)
    folder = str(path.parent.absolute())
    if folder not in sys.path:  # so that it can import its neighbours, now and when it is called
        sys.path.append(folder)
    try:
        exec(code, module.__dict__)  # the user's own file: running it is the point
    except Exception as error:
        last = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f":{last[-1].lineno}" if last else ""
        raise ConfigError(f"{path}{line}: importing the reward file raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        hint = did_you_mean(name, names) or (f"; it has {', '.join(names)}" if names else "; it defines no functions")
        raise ConfigError(f"{path}: has no function {name!r}{hint}")
    return function


class FunctionScorer(Scorer):
    """Wraps the user's function; see the module's docstring for what it may look like."""

    reads = "frame"

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self.function = load_function(spec)
        self.reads = getattr(self.function, "reads", "frame")
        self.batched = bool(getattr(self.function, "batched", False))
        if self.reads not in ("frame", "video"):
            raise ConfigError(f"{spec}: reads = {self.reads!r}; expected 'frame' or 'video'")
        parameters = inspect.signature(self.function).parameters
        names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keywords = [p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY]
        if len(names) < 2:
            raise ConfigError(f"{spec}: the function takes ({', '.join(names)}); it must take (frames, prompt)")
        free = set(names[2:] + keywords) - set(_EXTRAS)
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        for key in options:
            if key not in free and not takes_any:
                allowed = did_you_mean(key, free) or f"; its options are: {', '.join(sorted(free)) or 'none'}"
                raise ConfigError(f"{spec}: unknown option {key!r}{allowed}")
        missing = [n for n in free if parameters[n].default is inspect.Parameter.empty and n not in options]
        if missing:
            raise ConfigError(f"{spec}: the option {missing[0]!r} has no default; set it under args")
        self.extras = [extra for extra in _EXTRAS if extra in names + keywords]
        self.options = dict(options)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        metadata = [prompt.metadata for prompt in prompts]
        if self.batched:
            return self.function(media.frames, [p.text for p in prompts], **self._extra(metadata, media.fps))
        results = []
        for frames, prompt, data in zip(media.frames, prompts, metadata, strict=True):
            value = self.function(frames, prompt.text, **self._extra(data, media.fps))
            if np.ndim(value) != 0 or isinstance(value, str | bytes | dict) or value is None:
                raise TypeError(f"the function returned {value!r:.60} instead of one number")
            results.append(float(value))
        return np.asarray(results, dtype=np.float32)

    def _extra(self, metadata: Any, fps: float) -> dict[str, Any]:
        available = {"metadata": metadata, "fps": fps}
        return {**{name: available[name] for name in self.extras}, **self.options}
