"""The areas of the fuzz that read text: configs, prompts files, command lines, the bodies of requests."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.resilience.fuzz import Case, rushes
from benchmarks.resilience.fuzz_inputs import JSON_TEXTS, VALUES, YAML_TEXTS, changed_values, damaged

MODEL = Path(__file__).parents[2] / "models" / "shapes-image"
DRY_SHARE = 0.15  # of the configs that are checked like a run, not only read
Area = Callable[[Path, random.Random], Iterator[Case]]


def good_config(work: Path) -> dict[str, Any]:
    """Every key of a config whose checks all pass."""
    from pipeline.config.schema import Config

    (work / "train.txt").write_text("a red circle\na blue square\n")
    (work / "heldout.txt").write_text("a green square\n")
    base = {
        "run": {"dir": "runs", "name": "r"},
        "generator": {"pretrained": str(MODEL), "height": 48, "width": 48},
        "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
        "rewards": {"j": {"scorer": "jpeg_compressibility"}},
        "tracking": {"backends": []},
        "ray": {"address": "local"},
    }
    return Config.model_validate(base).model_dump(mode="json")


def write(path: Path, data: str | bytes) -> Path:
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if path.is_symlink() or path.is_file():
        path.unlink()
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------------ config


def config_values(work: Path, rng: random.Random) -> Iterator[Case]:
    """Each key with each odd value. What a key's type cannot be must be refused."""
    from pipeline.config.reference import leaves

    plain = good_config(work)
    if DRY_SHARE:
        write(work / "c.yaml", json.dumps(plain))
        rushes("train", "c.yaml", "--dry-run")  # imports libraries, which takes longer than an input may
    for leaf in leaves():
        path = leaf.path.replace("*", "j")
        for value in VALUES:
            changed = json.loads(json.dumps(plain))
            *sections, key = path.split(".")
            at = changed
            for section in sections:
                at = at.setdefault(section, {})
            at[key] = value
            yield Case(
                area="config",
                name=f"{path} = {str(value)[:30]!r}",
                run=_config_case(work, json.dumps(changed), dry=rng.random() < DRY_SHARE),
                must_refuse=_impossible(leaf, value),
            )


def _impossible(leaf: Any, value: Any) -> bool:
    if value == "http://me:secret@host/x":
        return True
    container = isinstance(value, list | dict)
    if leaf.whole:
        fraction = isinstance(value, float) and (value != math.floor(value) or abs(value) > 2**53)
        return container or isinstance(value, bool | str) or fraction
    if leaf.allowed.startswith("number"):
        return container or isinstance(value, bool | str)
    return leaf.text_only and (container or isinstance(value, bool | int | float))


def _config_case(work: Path, text: str, dry: bool) -> Callable[[], None]:
    def run() -> None:
        write(work / "c.yaml", text)
        rushes("train", "c.yaml", "--dry-run") if dry else rushes("config", "c.yaml")

    return run


def texts(work: Path, rng: random.Random) -> Iterator[Case]:
    """YAML that is no config, and prompts files of all kinds."""
    from pipeline.core.prompts import load_prompts

    def prompts(name: str, data: str | bytes) -> Callable[[], Any]:
        return lambda: load_prompts(write(work / name, data))

    for text in YAML_TEXTS:
        yield Case(area="text", name=f"yaml {text[:30]!r}", run=_config_case(work, text, False), must_refuse=True)
    good = json.dumps(good_config(work), indent=1).encode()
    for name, data in damaged(good, rng, 60):
        yield Case(area="text", name=f"config {name}", run=lambda data=data: _damaged_config(work, data))  # type: ignore[misc]
    for text in JSON_TEXTS:
        yield Case(area="text", name=f"jsonl {text[:30]!r}", run=prompts("p.jsonl", text))
        yield Case(
            area="text", name=f"second line {text[:30]!r}", run=prompts("p.jsonl", f'{{"prompt": "a"}}\n{text}\n')
        )
        yield Case(area="text", name=f"txt {text[:30]!r}", run=prompts("p.txt", text))
    row = {"prompt": "a", "negative": "b", "metadata": {"n": 1, "rewards": ["j"]}, "image": "a.png"}
    for name, changed in changed_values(row, rng, 60):
        yield Case(area="text", name=f"row {name}", run=prompts("p.jsonl", json.dumps(changed)))
    for name, data in damaged(_parquet(work, {"prompt": ["a", "b"], "n": [1, 2]}), rng, 60):
        yield Case(area="text", name=f"parquet {name}", run=prompts("p.parquet", data))
    for number, columns in enumerate(_odd_columns()):
        yield Case(area="text", name=f"columns {number}", run=prompts("p.parquet", _parquet(work, columns)))
    for number, data in enumerate(
        [b"\xff\xfe\x00a", b"a\xff", b"\x00" * 99, b"a\rb\rc", b"PAR1", b"PAR1PAR1", b"\x80\n"]
    ):
        for suffix in ("txt", "jsonl", "parquet", "csv", "json", ""):
            yield Case(area="text", name=f"bytes {number}.{suffix}", run=prompts(f"b.{suffix}", data))


def _damaged_config(work: Path, data: bytes) -> None:
    write(work / "c.yaml", data)
    rushes("config", "c.yaml")


def _parquet(work: Path, columns: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _odd_columns() -> list[dict[str, Any]]:
    return [
        {},
        {"prompt": []},
        {"prompt": [None]},
        {"prompt": [1]},
        {"prompt": [[1]]},
        {"prompt": ["a"], "image": [b"x"]},
        {"text": ["a"]},
        {"prompt": ["a"], "image": [{"bytes": b"x", "path": None}]},
        {"prompt": ["a"], "metadata": ["{"]},
        {"prompt": [b"\xff"]},
        {"prompt": [{"a": 1}]},
        {"prompt": ["a"], "prompt_index": [1.5]},
        {"prompt": [True]},
        {"prompt": ["a"], "negative": [["b"]]},
        {"prompt": ["a" * 200_000]},
        {"prompt": ["a"], "metadata": [{"x": float("nan")}]},
    ]


# ------------------------------------------------------------------------------------------------ command line


def command_lines(work: Path, rng: random.Random) -> Iterator[Case]:
    """Commands with arguments that none of them can take."""
    good = json.dumps(good_config(work))
    odd = [
        "",
        "--nonsense",
        "nowhere",
        "../nowhere",
        "/dev/null",
        "/dev/zero",
        ".",
        "\x00",
        "-1",
        "\udcff",
        "a" * 300,
        "=",
        "a=b",
    ]
    first = {
        "train": ["c.yaml"],
        "config": ["c.yaml"],
        "generate": ["c.yaml", "-p", "a"],
        "evaluate": ["c.yaml", "--no-base"],
        "export": [],
        "inspect": [],
        "report": [],
        "score": ["-r", "jpeg_compressibility"],
        "agree": ["-r", "jpeg_compressibility"],
        "label": ["--export"],
        "serve-reward": [],
        "size": ["c.yaml"],
        "stop": [],
        "status": [],
        "watch": [],
        "logs": [],
        "scale": [],
        "submit": ["c.yaml"],
    }

    def run(arguments: list[str]) -> Callable[[], None]:
        def call() -> None:
            write(work / "c.yaml", good)
            rushes(*arguments)

        return call

    for command, arguments in first.items():
        for value in odd:
            given = [command, *arguments, value]
            if command == "serve-reward" or (command, value) in {("status", ""), ("config", "a=b")}:
                given = [*given, "--nonsense"]
            yield Case(area="command line", name=repr(given)[:80], run=run(given), must_refuse=True)
    for option in ("--takes", "--seed", "--steps"):
        for value in ("0.5", "-1", "x", "1e9", "9" * 400):
            given = ["generate", "c.yaml", "-p", "a", option, value, "--out", "/dev/null"]
            yield Case(area="command line", name=repr(given)[:80], run=run(given), must_refuse=True)
    yield Case(area="command line", name="unknown command", run=run(["trian"]), must_refuse=True)
    yield Case(area="command line", name="bare", run=run([]))


# ------------------------------------------------------------------------------------------------- HTTP bodies


def request_bodies(work: Path, rng: random.Random) -> Iterator[Case]:
    """The bodies of `serve-reward`, without the server."""
    from jobs.common.score_request import decode_takes, decoding_size
    from pipeline.rewards.models.protocol import encode_frames, parse_request

    frames = np.zeros((2, 8, 8, 3), np.uint8)
    item = {"prompt": "a", "metadata": {"n": 1}, "fps": 8.0}
    for encoding in ("png", "mp4", "safetensors"):
        body = {"version": 1, "items": [{**item, **encode_frames(frames, 8.0, encoding)}]}

        def read(data: bytes) -> None:
            request = parse_request(data)
            decoding_size(request)
            decode_takes(request, work)

        for what, value in changed_values(body, rng, 40):
            data = json.dumps(value).encode()
            yield Case(area="request bodies", name=f"{encoding} {what}", run=lambda data=data: read(data))  # type: ignore[misc]
        for what, data in damaged(json.dumps(body).encode(), rng, 30):
            yield Case(area="request bodies", name=f"{encoding} {what}", run=lambda data=data: read(data))  # type: ignore[misc]
        key = next(key for key in body["items"][0] if key in ("frames", "video", "tensor"))  # type: ignore[index]
        held = body["items"][0][key]  # type: ignore[index]
        raw = base64.b64decode(held[0] if isinstance(held, list) else held)
        for what, changed in damaged(raw, rng, 30):
            text = base64.b64encode(changed).decode()
            one = {**item, key: [text] if isinstance(held, list) else text}
            data = json.dumps({"version": 1, "items": [one]}).encode()
            yield Case(area="request bodies", name=f"{key} {what}", run=lambda data=data: read(data))  # type: ignore[misc]


AREAS: dict[str, Area] = {
    "config": config_values,
    "text": texts,
    "command line": command_lines,
    "request bodies": request_bodies,
}
