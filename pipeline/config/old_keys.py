"""Keys that an earlier version read: what to write instead, for the line that refuses them."""

from typing import Any

RENAMED = {
    "algorithm.advantage.clamp": "signal.clamp",
    "algorithm.advantage.combine": "signal.combine",
    "algorithm.advantage.std": "signal.std",
    "algorithm.advantage.zero_std": "signal.zero_std",
    "algorithm.clip_high": "objective.clip_high",
    "algorithm.clip_low": "objective.clip_low",
    "algorithm.group_size": "step.takes",
    "algorithm.groups_per_step": "step.groups",
    "algorithm.kl_beta": "objective.kl_beta",
    "algorithm.kl_every": "objective.kl_every",
    "algorithm.max_staleness": "step.max_staleness",
    "algorithm.objective": "objective.name",
    "algorithm.updates_per_step": "step.updates",
    "generator.call": "generator.call_kwargs",
    "learner.lanes": "learner.replicas",
    "rewards.*.repeats": "rewards.*.score_repeats",
    "rollout.timeout_s": "faults.call_timeout_s",
    "takes.every": "tracking.save_takes_every",
}

REPLACED = {
    "algorithm.advantage.eps": "it is always 1e-4; leave it out",
    "evaluation.reward_target": "a run ends at run.steps; leave it out",
    "evaluation.seed": "every evaluation draws the same takes; leave it out",
    "optimizer.beta1": "write optimizer.betas: [beta1, beta2]",
    "optimizer.beta2": "write optimizer.betas: [beta1, beta2]",
    "prompts.shuffle": "prompts are visited in a new random order each epoch; leave it out",
    "ray.dashboard": "write ray.init: {dashboard_port: 8265}",
    "ray.num_cpus": "write ray.init: {num_cpus: 8}",
    "ray.object_store_mb": "write ray.init: {object_store_memory: 536870912} (bytes)",
    "ray.queue_capacity": "it follows from rollout.workers; leave it out",
    "rewards.*.batch_ms": "a server waits 10 ms for more groups; leave it out",
    "rewards.*.segments.shape": "the attenuation is always exponential; leave it out",
    "sampler.window.start": "write sampler.window.range: [first, end]",
    "sampler.window.stop": "write sampler.window.range: [first, end]",
    "tracking.project": "set WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME instead",
}


def advice(path: str, data: Any) -> str | None:
    """`key: what to write instead` for the old key at `path`, or for each old key that `data` has in the section at
    `path`; None if there is none."""
    below = [old for old in (*RENAMED, *REPLACED) if old.startswith(f"{path}.") and _is_set(data, old)]
    return "; ".join(line for old in below if (line := _advice(old))) or _advice(path)


def _is_set(data: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(data, dict) or name not in data:
            return False
        data = data[name]
    return True


def _advice(path: str) -> str | None:
    names = path.split(".")
    for old in (*RENAMED, *REPLACED):
        pattern = old.split(".")[: len(names)]
        if len(pattern) == len(names) and all(p in ("*", name) for p, name in zip(pattern, names, strict=True)):
            reward = names[1] if "*" in pattern else "<name>"
            if old in RENAMED:
                return f"{old}: is now {RENAMED[old]}".replace("*", reward)
            return f"{old}: is no longer a key: {REPLACED[old]}".replace("*", reward)
    return None
