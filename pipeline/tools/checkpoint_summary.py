"""The parts of `rushes inspect`'s report: components and their memory, guidance rule, batch layout, LoRA layers."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch

from pipeline.config.schema import TrainableConfig
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.generators.adapters import lora_targets

RANK = 16

_RULE_TEXTS = {
    "identity": "no guidance in the sampler: the denoiser's output as it is",
    "cfg": "classifier-free guidance, uncond + g (cond - uncond)",
    "cfg+1": "classifier-free guidance, cond + g (cond - uncond)",
    "linear": "a weighted sum of the denoiser's outputs and the sample, weights found at each step",
}


def components_of(pipe: Any) -> list[dict[str, Any]]:
    """Every component with its class; modules with parameters, bytes and dtype."""
    entries = []
    for name, component in pipe.components.items():
        if component is None:
            continue
        entry: dict[str, Any] = {"name": name, "class": type(component).__name__}
        if isinstance(component, torch.nn.Module):
            parameters = list(component.parameters())
            dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
            entry["parameters"] = sum(p.numel() for p in parameters)
            entry["bytes"] = sum(p.numel() * p.element_size() for p in parameters)
            entry["dtype"] = dtypes.most_common(1)[0][0] if dtypes else None
        entries.append(entry)
    return entries


def memory_by_dtype(components: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of weights per dtype."""
    total: Counter[str] = Counter()
    for entry in components:
        if entry.get("dtype"):
            total[entry["dtype"]] += entry["bytes"]
    return dict(total)


def rule_text(probe: dict[str, Any]) -> str:
    """The guidance rule as a sentence."""
    rule = probe["guidance_rule"]
    if rule.startswith("linear"):
        text = _RULE_TEXTS["linear"]
    elif rule.startswith("identity"):
        text = _RULE_TEXTS["identity"]
    else:
        text = _RULE_TEXTS["cfg+1" if "g+1" in rule else "cfg"] + f" with g = {probe['guidance_scale']:g}"
        calls = probe["denoiser_calls_per_step"]
        text += ", from one doubled batch" if calls == 1 else f", from {calls} calls"
        if "token norm cap" in rule:
            text += "; each token's norm is capped by the conditional output's"
        elif "token norm" in rule:
            text += "; each token keeps the conditional output's norm"
        elif "sample std" in rule:
            text += "; each take keeps the conditional output's standard deviation"
        elif "norm cap" in rule:
            text += "; each take's norm is capped by the conditional output's"
    return text + ("; the scheduler is given the negated value" if "negated" in rule else "")


def layout_text(probe: dict[str, Any]) -> list[str]:
    """The batch layout as a list of sentences."""
    lines = [f"called with {probe['call_mode']}"]
    if probe["conditions"]:
        lines.append(f"conditions given: {', '.join(probe['conditions'])}")
    cut = probe["output_slice"]
    if cut == "gather":
        lines.append("the scheduler sees the denoiser's output unpacked or sliced (traced value by value)")
    elif cut not in ("whole", "reshaped"):
        lines.append(f"of the denoiser's output the scheduler sees the {cut}")
    if probe["takes_note"]:
        lines.append(
            f"takes are replayed together, since they cannot be told apart in the inputs: {probe['takes_note']}"
        )
    doubled = sum(1 for _, copies, order in probe["takes_axis"].values() if copies > 1 and order == "tile")
    folded = sum(1 for _, copies, order in probe["takes_axis"].values() if copies > 1 and order == "repeat")
    if doubled:
        lines.append(f"{doubled} inputs hold the batch once per guidance branch")
    if folded:
        lines.append(f"{folded} inputs hold frames folded into the batch")
    if probe["alike_outputs"]:
        lines.append(
            "prompt and negative prompt give nearly the same output (weights that were never trained?), so the "
            "guidance rule was found with made-up outputs"
        )
    if probe["chosen_share"] < 1.0:
        lines.append(
            f"the policy chooses {probe['chosen_share']:.0%} of the latent values; the pipeline puts the rest back"
        )
    return lines


def lora_of(modules: dict[str, torch.nn.Module]) -> dict[str, Any]:
    """What `trainable.targets: auto` would train at rank 16. Raises UnsupportedPolicyError where there is nothing."""
    layers: Counter[str] = Counter()
    parameters = 0
    for name, module in modules.items():
        targets = lora_targets(module, TrainableConfig().targets)
        layers[name] = len(targets)
        for target in targets:
            layer = cast(torch.nn.Linear, module.get_submodule(target))
            parameters += RANK * (layer.in_features + layer.out_features)
    if not parameters:
        raise UnsupportedPolicyError("no linear layer inside the denoiser's blocks: use trainable.kind full")
    full = sum(p.numel() for module in modules.values() for p in module.parameters())
    return {"rank": RANK, "layers": dict(layers), "parameters": parameters, "full_parameters": full}
