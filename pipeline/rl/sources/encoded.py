"""What sources of pictures and clips have in common: how these are read, and checked before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.config.sections.base import NonNegative
from pipeline.core.captioned_clips import ClipFormat, DataClips
from pipeline.rl.sources.base import Source

if TYPE_CHECKING:
    from pipeline.config.schema import Config

CHECKED = 2000  # files whose heads are read at the start; what is wrong with others fails their groups


class EncodedSource(Source):
    """Its takes are, or begin from, files that rollout workers encode."""

    fit: Literal["exact", "crop"] = Field(
        "exact", description="Clips of another size: refused, or scaled to cover the frame and cut to its middle."
    )
    largest_error: NonNegative = Field(
        12.0,
        description="Largest mean difference between a clip and its decoded encoding, in grey levels (0 to 255), when "
        "a rollout worker starts: above it, the VAE does not fit the data.",
    )

    def data_clips(self, cfg: Config) -> DataClips:
        generator = cfg.generator
        form = ClipFormat(generator.num_frames, generator.height, generator.width, generator.fps, self.fit)
        return DataClips(form, self.largest_error)
