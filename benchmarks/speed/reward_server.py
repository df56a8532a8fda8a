"""Scoring through a reward server against the plain batched loop, CLIP score on random weights, same batch size.

    python -m benchmarks.speed.reward_server [--batch 16] [--rounds 12] [--layers 12]

The plain loop calls the scorer in this process, a batch a call. The server is an actor on a local Ray: the same takes
come from the object store as groups of four, which share calls (`batch_items`). The two take turns, batch by batch, so
that whatever else the machine does meets both; the result is the median over the rounds of served / plain throughput.
Writes benchmarks/results/reward_server.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import ray  # noqa: E402
import tiny  # noqa: E402
import tiny_rewards  # noqa: E402
import torch  # noqa: E402
from score_work import score_work  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel  # noqa: E402

from actors.ray_options import RunContext, merged_env, to_bytes  # noqa: E402
from actors.reward_server import RewardServer  # noqa: E402
from actors.role_actor import use_threads  # noqa: E402
from jobs.cluster.ray_session import RaySession  # noqa: E402
from pipeline.config.schema import RewardConfig  # noqa: E402
from pipeline.core.types import Media, PromptItem  # noqa: E402
from pipeline.rewards.runner import build_reward  # noqa: E402

GROUP = 4  # takes


def clip(folder: Path, layers: int) -> Path:
    """ViT-B/32's picture tower with this many layers, and a text tower of two; random weights."""
    tokenizer = tiny_rewards.clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={"num_hidden_layers": layers}, projection_dim=512))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="takes a call, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    groups = options.batch // GROUP
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reward = RewardConfig(
            scorer="clip_score",
            args={"model": str(clip(folder / "clip", options.layers)), "batch": options.batch, "device": "cpu"},
            batch_items=options.batch,
        )
        cfg = tiny.config(folder, ray={"address": "local", "init": {"num_cpus": 2, "object_store_memory": 200 * 2**20}})
        cfg = cfg.model_copy(update={"rewards": {"clip": reward}})
        prompts = [PromptItem(index=i, text=f"a photo of object number {i}") for i in range(groups)]
        use_threads(1)
        plain = build_reward("clip", reward)
        with RaySession(cfg):
            server = start_server(cfg, folder, prompts)
            rounds = [one_round(plain, server, prompts, number) for number in range(-1, options.rounds)][1:]
    ratios = [plain_s / served_s for plain_s, served_s in rounds]
    result = {
        "what": "takes per second through a reward server / plain batched loop, clip_score, float32, one thread each",
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "plain_takes_per_s": round(options.batch / statistics.median(p for p, _ in rounds), 3),
        "served_takes_per_s": round(options.batch / statistics.median(s for _, s in rounds), 3),
        "batch": options.batch,
        "groups_per_call": groups,
        "picture_layers": options.layers,
        "pixels": "256x256 -> 224x224",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, ray {ray.__version__}",
        "command": f"python -m benchmarks.speed.reward_server {' '.join(sys.argv[1:])}".strip(),
    }
    out = ROOT / "benchmarks" / "results" / "reward_server.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def start_server(cfg, folder: Path, prompts: list[PromptItem]):
    ctx = RunContext(cfg=cfg, run_path=str(folder), cwd=os.getcwd())
    actor = ray.remote(RewardServer).options(num_cpus=1, runtime_env=merged_env({}, 1)).remote(ctx, "reward.clip-0")
    ray.get(actor.start.remote("clip", prompts))
    return actor


def one_round(plain, server, prompts: list[PromptItem], number: int) -> tuple[float, float]:
    """Seconds for the same takes, plain and served; the order changes every round. Round -1 warms up."""
    rng = np.random.default_rng(number + 1)
    media = [Media(frames=rng.integers(0, 256, (GROUP, 1, 256, 256, 3), dtype=np.uint8), fps=1.0) for _ in prompts]
    joined = Media(frames=np.concatenate([one.frames for one in media]), fps=1.0)
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    references = [ray.put(one) for one in media]
    works = [score_work(i, [prompt] * GROUP) for i, prompt in enumerate(prompts)]

    def run_plain() -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        values = plain.run(joined, repeated, None).values
        return time.perf_counter() - began, values

    def run_served() -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        outcomes = ray.get(server.score.remote(to_bytes(works), *references))
        return time.perf_counter() - began, np.concatenate([outcome.values for outcome in outcomes])

    if number % 2:
        (served_s, served), (plain_s, direct) = run_served(), run_plain()
    else:
        (plain_s, direct), (served_s, served) = run_plain(), run_served()
    np.testing.assert_allclose(served, direct, atol=1e-5)
    return plain_s, served_s


if __name__ == "__main__":
    main()
