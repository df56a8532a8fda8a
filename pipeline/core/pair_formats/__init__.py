"""The formats of other people's preference data, one file each, told apart by their columns."""

from pipeline.core.pair_formats.base import FORMATS as FORMATS
