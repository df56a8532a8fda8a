"""A user's reward file is imported as Python imports it, and owns what it is given."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer
from pipeline.rewards.batching import Takes, score_groups
from pipeline.rewards.runner import RewardRunner, build_reward, check_reward

GREY = np.full((2, 1, 4, 4, 3), 120, np.uint8)
PROMPTS = [PromptItem(index=i, text="a", metadata={"words": ["x"]}) for i in range(2)]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def reward(spec, name="mine"):
    return build_reward(name, RewardConfig(scorer=str(spec)))


def score_of(spec, frames=GREY):
    return reward(spec).run(Media(frames=frames, fps=8.0), PROMPTS, None).values.tolist()


@pytest.mark.parametrize(
    "source",
    [
        "from dataclasses import dataclass\n@dataclass\nclass S:\n    value: float = 3.0\n",
        "from __future__ import annotations\nimport typing\nclass S:\n    value: V = 3.0\nclass V: pass\n"
        "assert typing.get_type_hints(S)['value'] is V\n",
        "import pickle\nclass S:\n    value = 3.0\nS = type(pickle.loads(pickle.dumps(S())))\n",
        "import enum, sys\nclass S(enum.Enum):\n    value = 3.0\nS = sys.modules[__name__].S\n"
        "class S:\n    value = 3.0\n",
    ],
    ids=["dataclass", "annotations", "pickle", "sys.modules"],
)
def test_what_looks_up_its_own_module_works(tmp_path, source):
    write(tmp_path, {"mine.py": source + "def score(frames, prompt):\n    return S.value\n"})
    assert score_of(f"{tmp_path}/mine.py:score") == [3, 3]


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"\xef\xbb\xbfTEXT = 'x'\n", 1),
        ("# -*- coding: utf-8-sig -*-\nTEXT = 'x'\n".encode("utf-8-sig"), 1),
        (b"# coding: latin-1\nTEXT = '\xe9\xe9'\n", 2),
        (b"TEXT = 'x'\r\n\r\n", 1),
    ],
    ids=["bom", "bom and coding", "latin-1", "crlf"],
)
def test_the_source_is_decoded_by_python(tmp_path, data, expected):
    write(tmp_path, {"mine.py": data + b"def score(frames, prompt):\n    return len(TEXT)\n"})
    assert score_of(f"{tmp_path}/mine.py:score") == [expected, expected]


@pytest.mark.parametrize(
    "importing",
    [
        "import utils",
        "from . import utils",
        "from .utils import K as value\nclass utils: K = value",
        "from utils import K as value\nclass utils: K = value",
        "import helpers.deep\nclass utils: K = helpers.deep.K",
        "import helpers.deep as utils",
        "from helpers import deep as utils",
        "import between\nutils = between.utils",
    ],
)
@pytest.mark.parametrize("when", ["at import", "at call"])
def test_helpers_of_the_same_name_in_two_folders_are_two_modules(tmp_path, importing, when):
    lines = importing.split("\n")
    body = "    return float(utils.K)"
    if when == "at import":
        source = "\n".join([*lines, "def score(frames, prompt):", body, ""])
    else:
        source = "\n".join(["def score(frames, prompt):", *(f"    {line}" for line in lines), body, ""])
    for value, folder in enumerate("ab", start=1):
        helper = f"K = {value}\n"
        files = {"utils.py": helper, "helpers/__init__.py": "", "helpers/deep.py": "from utils import K\n"}
        write(tmp_path / folder, {"reward.py": source, "between.py": "import utils\n", **files})
    rewards = [reward(tmp_path / folder / "reward.py:score") for folder in "ab"]
    results = [r.run(Media(frames=GREY, fps=8.0), PROMPTS, None).values[0] for r in rewards]
    assert results == [1, 2]
    assert not {"utils", "helpers", "between"} & set(sys.modules) and str(tmp_path / "a") not in sys.path


def test_names_of_files_packages_and_installed_modules(tmp_path):
    score = "def score(frames, prompt):\n    return K\n"
    write(
        tmp_path,
        {
            "my-reward.v2.py": "from utils import K\n" + score,
            "utils.py": "K = 5\n",
            "yaml.py": "import yaml\nK = len(yaml.safe_dump([]))\n" + score,  # means the installed one, not itself
            "pack/__init__.py": "BASE = 6\n",
            "pack/inner/__init__.py": "",
            "pack/inner/mine.py": "from .. import BASE\nfrom ..more import K\nimport near\nassert near.K == BASE\n"
            + score,
            "pack/more.py": "K = 7\n",
            "pack/inner/near.py": "K = 6\n",
            "numpy/weights.txt": "",  # a mere folder
            "plain.py": "import numpy\nfrom pipeline.core.types import Media\nK = numpy.float64(8)\n" + score,
        },
    )
    for file, value in {"my-reward.v2": 5, "yaml": 3, "pack/inner/mine": 7, "plain": 8}.items():
        assert score_of(f"{tmp_path}/{file}.py:score") == [value, value], file


def test_a_file_that_has_changed_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for value in (1, 2):  # the same size, within a second
        write(tmp_path, {"mine.py": f"import utils\ndef score(frames, prompt):\n    return utils.K + {value}\n"})
        write(tmp_path, {"utils.py": f"K = {value}\n"})
        assert score_of(f"{tmp_path}/mine.py:score") == [2 * value, 2 * value]
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_pool_calls_functions_of_the_file(tmp_path, method):
    write(
        tmp_path,
        {
            "utils.py": "def one(frame):\n    return float(frame.mean())\n",
            "mine.py": "import multiprocessing as mp\nfrom concurrent.futures import ProcessPoolExecutor as Pool\n"
            "import utils\ndef here(frame):\n    return utils.one(frame) + 1\ndef score(frames, prompt):\n"
            f"    with Pool(1, mp.get_context('{method}')) as pool:\n"
            "        return list(pool.map(here, list(frames)))[0] + list(pool.map(utils.one, list(frames)))[0]\n",
        },
    )
    program = (
        "import json, numpy, sys\n"
        "from pipeline.config.schema import RewardConfig\nfrom pipeline.rewards.runner import build_reward\n"
        "from pipeline.core.types import Media, PromptItem\n"
        "if __name__ == '__main__':\n"
        "    media = Media(frames=numpy.full((1, 1, 4, 4, 3), 120, numpy.uint8), fps=8.0)\n"
        "    runner = build_reward('m', RewardConfig(scorer=sys.argv[1]))\n"
        "    print(json.dumps(runner.run(media, [PromptItem(index=0, text='a')], None).values.tolist()))\n"
    )
    write(tmp_path, {"main.py": program})
    command = [sys.executable, str(tmp_path / "main.py"), f"{tmp_path}/mine.py:score"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [241]


@pytest.mark.parametrize(
    "source, parts",
    [
        ("import sys\nsys.exit(0)\n", ["mine.py:2", "SystemExit"]),
        ("import helper\n", ["helper.py:2", "syntax error"]),
        ("def score(frames, prompt):\n    yield 1\n", ["score yields", "use return"]),
        ("async def score(frames, prompt):\n    yield 1\n", ["score yields", "use return"]),
        ("score = iter\n", ["parameters", "wrap it in a def"]),
        (b"x = '\xff'\n", ["mine.py:1", "syntax error"]),
    ],
)
def test_what_cannot_be_a_reward_is_refused_by_the_dry_run(tmp_path, source, parts):
    write(tmp_path, {"mine.py": source, "helper.py": "x = 1\ndef (:\n"})
    with pytest.raises(ConfigError) as caught:
        check_reward("mine", RewardConfig(scorer=f"{tmp_path}/mine.py:score"))
    for part in ["rewards.mine", *parts]:
        assert part in str(caught.value) and "\n" not in str(caught.value)


ASYNC = (
    "import asyncio\nlock = asyncio.Lock()\nbusy = most = 0\n"
    "async def score(frames, prompt, most_at_once=False):\n    global busy, most\n    busy += 1\n"
    "    most = max(most, busy)\n    await asyncio.sleep(0.02)\n    async with lock:\n        busy -= 1\n"
    "    return most if most_at_once else frames.mean()\n"
    "def wrapped(frames, prompt):\n    return score(frames, prompt)\n"
    "async def batch(frames, prompt):\n    return frames.mean(axis=(1, 2, 3, 4))\nbatch.batched = True\n"
    "async def fails(frames, prompt):\n    await asyncio.sleep(0)\n    raise KeyError('no face')\n"
    "async def leaves(frames, prompt):\n    raise SystemExit(0)\n"
    "async def judge(a, b, prompt):\n    return 0.25\n"
)


def test_async_functions_are_awaited_a_calls_takes_together(tmp_path):
    write(tmp_path, {"mine.py": ASYNC})
    for name in ("score", "wrapped", "batch"):
        assert score_of(f"{tmp_path}/mine.py:{name}") == [120, 120]
        assert score_of(f"{tmp_path}/mine.py:{name}") == [120, 120]  # the same event loop: its lock still works
    config = RewardConfig(scorer=f"{tmp_path}/mine.py:score", args={"most_at_once": True})
    assert build_reward("m", config).run(Media(frames=GREY, fps=8.0), PROMPTS, None).values.tolist() == [2, 2]
    tournament = RewardConfig(scorer="tournament", args={"judge": f"{tmp_path}/mine.py:judge"})
    result = build_reward("m", tournament).run(Media(frames=GREY, fps=8.0), [PROMPTS[0]] * 2, None)
    assert result.values.tolist() == [0.5, 0.5]


def test_an_async_function_is_awaited_inside_a_running_loop(tmp_path):
    write(tmp_path, {"mine.py": ASYNC})

    async def inside():
        return score_of(f"{tmp_path}/mine.py:score")

    assert asyncio.run(inside()) == [120, 120]


@pytest.mark.parametrize("name, part", [("fails", "KeyError: 'no face'"), ("leaves", r"called sys.exit\(0\)")])
def test_failures_of_async_functions_are_failures(tmp_path, name, part):
    write(tmp_path, {"mine.py": ASYNC})
    with pytest.raises(RewardError, match=f"reward mine: .*{part}"):
        score_of(f"{tmp_path}/mine.py:{name}")


IN_PLACE = (
    "def score(frames, prompt, metadata, seen=()):\n    value = frames.mean() + len(metadata['words']) + len(seen)\n"
    "    frames[:] = 0\n    metadata['words'].append('y')\n    seen += ['z'] if seen else ()\n    return value\n"
    "def video(frames, prompt, metadata):\n    return score(frames, prompt, metadata)\nvideo.reads = 'video'\n"
    "def batch(frames, prompts, metadata):\n"
    "    return [score(*each) for each in zip(frames, prompts, metadata)]\nbatch.batched = True\n"
    "batch.reads = 'video'\n"
    "def fails(frames, prompt):\n    frames[:] = 0\n    raise ValueError('no')\nfails.reads = 'video'\n"
)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("name", ["score", "video", "batch"])
@pytest.mark.parametrize("readonly", [False, True], ids=["own memory", "Ray's memory"])
def test_a_reward_that_writes_into_its_input_changes_nobody_elses(tmp_path, frames, name, readonly):
    write(tmp_path, {"mine.py": IN_PLACE})
    media = Media(frames=np.full((2, frames, 4, 4, 3), 120, np.uint8), fps=8.0)
    media.frames.flags.writeable = not readonly
    args = {"seen": ["z"]} if name == "score" else {}
    runner = build_reward("mine", RewardConfig(scorer=f"{tmp_path}/mine.py:{name}", args=args))
    for _ in range(2):
        for groups in ([Takes(media, PROMPTS, 1)], [Takes(media, PROMPTS, 1)] * 2):  # alone, and joined
            for outcome in score_groups(runner, groups):
                assert outcome.values.tolist() == [121 + len(args)] * 2
    with pytest.raises(RewardError, match="no"):
        reward(f"{tmp_path}/mine.py:fails").run(media, PROMPTS, None)
    assert (media.frames == 120).all() and PROMPTS[0].metadata == {"words": ["x"]}


def test_a_registered_scorer_cannot_write_into_the_frames():
    class InPlace(Scorer):
        reads = "video"

        def score(self, media, prompts):
            media.frames[:] = 0
            return np.zeros(len(prompts))

    runner = RewardRunner("mine", RewardConfig(scorer="in_place"), InPlace())
    media = Media(frames=GREY.copy(), fps=8.0)
    with pytest.raises(RewardError, match="read-only"):
        runner.run(media, PROMPTS, None)
    assert (media.frames == 120).all() and media.frames.flags.writeable
