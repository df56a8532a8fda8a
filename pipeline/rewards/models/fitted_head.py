"""A linear head on CLIP's embeddings, fitted to people's judgements: what it computes, and its folder.

The folder holds config.json (`FittedConfig`), head.safetensors (heads float32 [M, 1 + 2 D], probe [2, D] and, where it
tells users apart, mixtures [U, M]) and a card. Whatever is wrong with a folder is one line, before CLIP is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from pipeline.core.errors import InputError
from pipeline.core.files import atomic_write, did_you_mean
from pipeline.core.reading import MAX_TEXT, parse_json_object, read_bytes
from pipeline.core.records import check_record
from pipeline.core.safe_paths import not_regular

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, CARD = "config.json", "head.safetensors", "README.md"
MAX_BYTES = 256 * 2**20  # of head.safetensors
_FIX = "only `rushes fit-reward` writes such a folder; fit it again, or copy it again"


class FittedConfig(BaseModel):
    """config.json of a fitted head."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["rushes-fitted-clip"] = "rushes-fitted-clip"
    version: Literal[1] = 1
    base: Annotated[str, Field(min_length=1, max_length=4096)]  # the CLIP: a folder or a hub id
    width: Annotated[int, Field(ge=1, le=65536)]  # of its embeddings
    tie: Annotated[FiniteFloat, Field(ge=0)]  # eta of Rao and Kupper's model; 0: no ties
    users: list[Annotated[str, Field(min_length=1, max_length=200)]] = []  # rows of `mixtures`


def features(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Embeddings [..., D] of pictures and of their prompts -> [..., 1 + 2 D]: their cosine, their product in each
    dimension, and the picture's own. Linear in the picture's, so a mean over frames may be taken before or after."""
    import torch

    product = images * texts
    return torch.cat([product.sum(dim=-1, keepdim=True), product, images], dim=-1)


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """score = features . sum_m mixture_m heads_m, in log-odds: a difference of 1 means odds of e to 1."""

    config: FittedConfig
    heads: torch.Tensor  # float32 [M, 1 + 2 D]
    mixtures: torch.Tensor  # float32 [U, M], rows sum to 1; U = 0 where all people share one head
    probe: torch.Tensor  # float32 [2, D]: what the CLIP makes of a picture and a text that never change
    digest: str = ""  # of the folder's two files, 16 hexadecimal digits

    def weights(self, user: str | None) -> torch.Tensor:
        """[1 + 2 D] for one of `config.users`; None: the mean over all of them. Raises `InputError`."""
        if user is None:
            return self.heads.mean(dim=0) if not len(self.mixtures) else (self.mixtures @ self.heads).mean(dim=0)
        if user not in self.config.users:
            there = f": {', '.join(self.config.users[:20])}" if self.config.users else ": it was fitted to all alike"
            raise InputError(f"found {user!r:.80}, which is none of the raters that the reward tells apart"
                             f"{did_you_mean(user, self.config.users) or there}")  # fmt: skip
        return self.mixtures[self.config.users.index(user)] @ self.heads


def save_head(folder: Path, head: FittedHead) -> str:
    """Writes the head's two files. Returns their digest. Raises `RushesError`."""
    from safetensors.torch import save

    tensors = {"heads": head.heads.float().contiguous(), "probe": head.probe.float().contiguous()}
    if head.config.users:
        tensors["mixtures"] = head.mixtures.float().contiguous()
    config, weights = json.dumps(head.config.model_dump(), indent=1).encode() + b"\n", save(tensors)
    atomic_write(folder / WEIGHTS, weights)
    atomic_write(folder / CONFIG, config)
    return _digest(config, weights)


def load_head(folder: Path) -> FittedHead:
    """Raises `InputError`: files that are missing, other keys, other tensors or shapes, numbers that are not finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that `rushes fit-reward --out` has written")
    for name in (CONFIG, WEIGHTS):
        if problem := not_regular(folder / name):
            raise InputError(f"{folder / name} {problem}; {_FIX}")
    text = read_bytes(folder / CONFIG, MAX_TEXT)
    row = parse_json_object(text, str(folder / CONFIG), _FIX)
    check_record(FittedConfig, row, str(folder / CONFIG))
    config = FittedConfig.model_validate(row)
    data, path = read_bytes(folder / WEIGHTS, MAX_BYTES), folder / WEIGHTS
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); {_FIX}") from None
    expected = {"heads", "probe"} | ({"mixtures"} if config.users else set())
    if set(tensors) != expected:
        raise InputError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; expected "
                         f"{', '.join(sorted(expected))}; {_FIX}")  # fmt: skip
    count, columns = tensors["heads"].shape[0] if tensors["heads"].ndim else 0, 1 + 2 * config.width
    shapes = {"heads": [count, columns], "probe": [2, config.width], "mixtures": [len(config.users), count]}
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != torch.float32 or list(tensor.shape) != shapes[name] or not tensor.numel():
            raise InputError(f"{path}: {name} is {str(tensor.dtype)[6:]} {list(tensor.shape)}; expected float32 "
                             f"{shapes[name]} for a width of {config.width}; {_FIX}")  # fmt: skip
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds NaN or infinity; {_FIX}")
    return FittedHead(
        config=config,
        heads=tensors["heads"],
        mixtures=tensors.get("mixtures", torch.zeros(0, count)),
        probe=tensors["probe"],
        digest=_digest(text, data),
    )


def _digest(config: bytes, weights: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()[:16]
