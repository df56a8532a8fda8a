"""A reward from the user's own file: `scorer: my_rewards.py:redness`.

    def redness(frames, prompt):                     # uint8 [F, H, W, 3] (F = 1 unless it reads videos), text
        red, green, blue = frames.mean(axis=(0, 1, 2)) / 255
        return red - (green + blue) / 2              # one finite number; higher is better

On videos such a function is applied to single frames, segment by segment. What may be added:

    def redness(frames, prompt, metadata): ...       # a third parameter gets the prompt's metadata
    redness.reads = "video"                          # the whole clip at once; a parameter `fps` gets its frame rate
    redness.batched = True                           # frames [K, F, H, W, 3], lists of K prompts (and metadata) -> [K]
    redness.takes = "pixels"                         # torch float32 [F, 3, H, W] from 0 to 1 -> a tensor of one number
                                                     # (batched: [K]), so that its gradient can be trained on

Further parameters are options, set by `rewards.<name>.args`. An `async def` is awaited, all takes of a call together.
What a reward is given is its own: it may write into the frames. A reward that cannot score must raise: the group is
retried and never scored 0. How the file is imported: `pipeline.rewards.user_code`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.errors import ConfigError, one_line
from pipeline.core.files import did_you_mean
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer
from pipeline.rewards.user_code import import_file

if TYPE_CHECKING:
    import torch

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
        module = import_file(path)  # the user's own file: running it is the point
    except SyntaxError as error:
        raise ConfigError(
            f"{error.filename or path}:{error.lineno or 1}: syntax error in the reward file ({error.msg}); correct "
            "that line"
        ) from None
    except (Exception, SystemExit) as error:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())]
        line = f":{lines[-1].lineno}" if lines else ""
        raise ConfigError(
            f"{path}{line}: importing the reward file raised {type(error).__name__}: {one_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        hint = did_you_mean(name, names) or (f"; it has {', '.join(names)}" if names else "; it defines no functions")
        raise ConfigError(f"{path}: has no function {name!r}{hint}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{path}: {name} yields its results; a reward must return them, so use return")
    return function


def call_function(function: Callable[..., Any], calls: Sequence[tuple[tuple, dict[str, Any]]]) -> list[Any]:
    """The results of a user's function for each (args, kwargs). Those of an async function are awaited together.

    The function owns what it is given: arrays, metadata and options are copies. Raises what the function raises.
    """
    with _no_exit():
        results = [function(*copy.deepcopy(args), **copy.deepcopy(kwargs)) for args, kwargs in calls]
    if any(inspect.isawaitable(result) for result in results):
        return asyncio.run_coroutine_threadsafe(_all(results), _event_loop()).result()
    return results


async def _all(results: list[Any]) -> list[Any]:
    """Every result, awaited where it is awaitable. Raises the first failure in order, once all have ended."""

    async def one(result: Any) -> Any:
        with _no_exit():
            return await result if inspect.isawaitable(result) else result

    done = await asyncio.gather(*map(one, results), return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done


@contextlib.contextmanager
def _no_exit() -> Iterator[None]:
    """sys.exit() in a user's function is its failure, not the end of this process."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"the function called sys.exit({error.code!r})") from error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all async functions of the process, in a thread of its own: a client that a function keeps between
    calls belongs to its loop, and the caller may be a coroutine itself."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


class FunctionScorer(Scorer):
    """Wraps the user's function; see the module's docstring for what it may look like."""

    reads = "frame"
    gradient_note = 'the function takes 8-bit frames; compute with torch and set its attribute takes = "pixels"'

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self.function = load_function(spec)
        self.reads = getattr(self.function, "reads", "frame")
        self.batched = bool(getattr(self.function, "batched", False))
        if self.reads not in ("frame", "video"):
            raise ConfigError(f"{spec}: reads = {self.reads!r}; expected 'frame' or 'video'")
        self.takes = getattr(self.function, "takes", "frames")
        if self.takes not in ("frames", "pixels"):
            raise ConfigError(f"{spec}: takes = {self.takes!r}; expected 'frames' or 'pixels'")
        if self.takes == "pixels":
            self.gradient_note = ""
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # some functions written in C
            raise ConfigError(
                f"{spec}: the parameters of {self.function!r:.60} cannot be read; wrap it in a def"
            ) from None
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
        if self.takes == "pixels" and "fps" in names + keywords:
            raise ConfigError(f"{spec}: a function that takes pixels is not given fps; take the parameter out")
        self.extras = [extra for extra in _EXTRAS if extra in names + keywords]
        self.options = dict(options)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        if self.takes == "pixels":
            import torch

            pixels = torch.from_numpy(np.array(media.frames)).permute(0, 1, 4, 2, 3).float() / 255
            with torch.no_grad():
                return self.score_pixels(pixels, prompts).cpu().numpy()
        if self.batched:
            metadata = [copy.deepcopy(prompt.metadata) for prompt in prompts]  # takes of one prompt share theirs
            texts = [prompt.text for prompt in prompts]
            return call_function(self.function, [((media.frames, texts), self._extra(metadata, media.fps))])[0]
        calls = [
            ((frames, prompt.text), self._extra(prompt.metadata, media.fps))
            for frames, prompt in zip(media.frames, prompts, strict=True)
        ]
        results = call_function(self.function, calls)
        for value in results:
            if np.ndim(value) != 0 or isinstance(value, str | bytes | dict) or value is None:
                raise TypeError(f"the function returned {value!r:.60} instead of one number")
        return np.asarray([float(value) for value in results], dtype=np.float32)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        """Not a copy: a function that writes into its pixels writes into the caller's."""
        import torch

        metadata = [prompt.metadata for prompt in prompts]
        with _no_exit():
            if self.batched:
                extra = copy.deepcopy(self._extra(metadata, 0.0))
                return self.function(pixels, [prompt.text for prompt in prompts], **extra)
            rows = [
                self.function(clip, prompt.text, **copy.deepcopy(self._extra(row, 0.0)))
                for clip, prompt, row in zip(pixels, prompts, metadata, strict=True)
            ]
        for row in rows:
            if not isinstance(row, torch.Tensor) or row.numel() != 1:
                raise TypeError(f"the function returned {row!r:.60} instead of a tensor of one number")
        return torch.stack([row.reshape(()) for row in rows])

    def _extra(self, metadata: Any, fps: float) -> dict[str, Any]:
        available = {"metadata": metadata, "fps": fps}
        return {**{name: available[name] for name in self.extras}, **self.options}
