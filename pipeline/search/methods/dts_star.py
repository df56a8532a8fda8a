"""DTS*: the tree of diffusion tree sampling, searched greedily for the best take."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import NonNegative
from pipeline.search.base import register
from pipeline.search.methods.dts import TreeNode, TreeSampling


@register("dts-star")
class TreeSearch(TreeSampling):
    """DTS*: diffusion tree sampling that goes on from the best child (UCT), and keeps the best take at any time."""

    exploration: NonNegative = Field(  # type: ignore[assignment]  # in place of the parent's share
        0.3, description="c of UCT: value + c sqrt(log visits / child's visits), in units of the reward."
    )

    def choose(self, node: TreeNode, rng: np.random.Generator) -> TreeNode:
        explored = math.log(max(node.visits, 1))
        bounds = [c.value + self.exploration * math.sqrt(explored / max(c.visits, 1)) for c in node.children]
        return node.children[int(np.argmax(bounds))]
