"""The config's `generator` and `trainable` sections: the diffusers pipeline, and which of its weights are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.sections.base import Count, NonNegative, Positive, Section


class GeneratorConfig(Section):
    """The diffusers pipeline that is trained, and how it is called."""

    pretrained: str = Field(description="diffusers checkpoint: local folder or hub id.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit) of the checkpoint.")
    pipeline: str | None = Field(
        None, description="diffusers pipeline class, such as LTXImageToVideoPipeline; default: the checkpoint's."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the weights for sampling; auto: bfloat16 on a GPU, float32 on the CPU."
    )
    height: Annotated[int, Field(ge=8)] = Field(512, description="Frame height in pixels.")
    width: Annotated[int, Field(ge=8)] = Field(512, description="Frame width in pixels.")
    num_frames: Count = Field(1, description="Frames per take; 1 for image generators.")
    fps: Positive = Field(8.0, description="Frame rate of the videos, in files and for scorers.")
    guidance_scale: NonNegative = Field(1.0, description="Classifier-free guidance in rollout and training (1: none).")
    call_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the pipeline's __call__, such as max_sequence_length."
    )
    embedding_cache: Path | None = Field(
        None, description="Folder for prompt embeddings; once it is filled, text encoders are not loaded."
    )
    compile: bool = Field(
        False,
        description="Compile the denoiser's blocks (torch.compile) in rollout workers and learner: faster, equal up to "
        "rounding. Needs a C++ compiler (CPU) or Triton (GPU); without one the blocks run uncompiled.",
    )
    offload: Literal["none", "idle", "group"] = Field(
        "none",
        description="What rollout workers keep on the accelerator. none: everything; idle: the denoiser, and other "
        "models only while they run; group: only the layers that run. idle and group decode take by take, in tiles.",
    )
    quantize: Literal["none", "int8"] = Field(
        "none", description="Quantisation of the frozen denoiser weights under a LoRA; int8: weight-only, by torchao."
    )

    @model_validator(mode="after")
    def _compiled_layers_stay(self) -> GeneratorConfig:
        if self.compile and self.offload == "group":
            raise ValueError("generator.compile: not with generator.offload group, which moves single layers; use idle")
        return self


class TrainableConfig(Section):
    """Which weights are trained."""

    kind: Literal["lora", "full"] = Field("lora", description="Train a PEFT LoRA or all weights of the denoiser.")
    modules: Literal["denoiser", "controlnet", "text_encoder", "both"] = Field(
        "denoiser",
        description="What is trained: the denoiser, the ControlNet that feeds it, the text encoders (as in TexForce; "
        "LoRA only), or denoiser and text encoders.",
    )
    rank: Count = Field(16, description="LoRA rank.")
    alpha: Positive = Field(32.0, description="LoRA alpha; the adapter is scaled by alpha / rank.")
    targets: list[str] | Literal["auto"] = Field(
        "auto", description="Names of the modules that get the LoRA; auto: every linear layer in the trained blocks."
    )

    @model_validator(mode="after")
    def _full_weights_are_the_denoisers(self) -> TrainableConfig:
        if self.trains_text and self.kind == "full":
            raise ValueError(
                f"trainable.modules: {self.modules} needs trainable.kind lora; full weights are trained for the "
                "denoiser or the ControlNet alone"
            )
        return self

    @property
    def trains_text(self) -> bool:
        """Whether text encoders are trained, so that prompt embeddings change with every version."""
        return self.modules in ("text_encoder", "both")

    @property
    def description(self) -> str:
        """`LoRA of rank 16 on the text encoders`: the trained weights, for messages and the report."""
        if self.kind == "full":
            return "all weights" + (" of the ControlNet" if self.modules == "controlnet" else "")
        where = {
            "denoiser": "",
            "controlnet": " on the ControlNet",
            "text_encoder": " on the text encoders",
            "both": " on denoiser and text encoders",
        }
        return f"LoRA of rank {self.rank}{where[self.modules]}"
