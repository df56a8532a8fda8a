"""docs/config.md: the config's schema, and the parts that there are (`rushes config --docs`)."""

from __future__ import annotations

from pipeline.config.reference import docs_markdown
from pipeline.rl.samplers import stochastic_samplers


def config_docs() -> str:
    return docs_markdown({"sampler.kind": list(stochastic_samplers())})
