"""docs/config.md: the config's schema, and the samplers and objectives that there are (`rushes config --docs`)."""

from __future__ import annotations

from pipeline.config.reference import docs_markdown
from pipeline.rl.objectives import objective_names
from pipeline.rl.samplers import stochastic_samplers


def config_docs() -> str:
    return docs_markdown({"sampler.kind": list(stochastic_samplers()), "algorithm.objective": objective_names()})
