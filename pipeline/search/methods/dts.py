"""Diffusion tree sampling (arXiv 2506.20701): denoising as a tree, the rewards of finished takes backed up in it.

Only finished takes are scored, so no reward is asked about a blurred prediction. A node's soft value is
V = (1 / lambda) log mean_children exp(lambda V_child), its children being draws of the unchanged model.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import Count, NonNegative, Positive
from pipeline.search.base import Advance, Found, Particle, Request, Score, Searching, Task, register
from pipeline.search.noisy import NoisySearch


@register("dts")
class TreeSampling(NoisySearch):
    """Diffusion tree sampling: children are chosen in proportion to exp(lambda value), so that takes come from the
    tilted model."""

    width: Positive = Field(1.5, description="A node has up to width x visits^growth children.")
    growth: NonNegative = Field(0.5, description="See width.")
    exploration: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5,
        description="Share of the choices on the way down that are made at random. With none, nodes whose first take "
        "had bad luck are never seen again, so that a small tree draws from less than the tilted model.",
    )
    children: Count | None = Field(None, description="Most children of a node; null: as many as its visits allow.")

    @property
    def particles(self) -> int:
        return 1

    def check(self, task: Task) -> None:
        super().check(task)
        self.levels(self.at, task, first=0)

    def search(self, task: Task) -> Searching:
        tree = yield from self.grow(task)
        leaves, shares = zip(*tree.leaves(self.strength), strict=True)
        if self.pick == "best":
            leaf = max(leaves, key=lambda leaf: leaf.value)
        else:
            leaf = leaves[int(task.rng().choice(len(leaves), p=np.array(shares) / sum(shares)))]
        return Found(leaf.particle, leaf.value)

    def grow(self, task: Task) -> Generator[Request, Any, TreeNode]:
        """The tree that the budget pays for."""
        rng, levels = task.rng(), [*self.levels(self.at, task, first=0), task.steps]
        tree = TreeNode(task.new_particle(), 0)
        idle = 0  # descents since the last that grew the tree
        while idle < 100:  # a tree whose children are limited may be complete
            node = tree
            while node.depth < len(levels) and not self._may_grow(node):
                node = self.choose(node, rng)
            if node.depth == len(levels):
                idle += 1
                node.back_up(self.strength)
                continue
            if task.trace.calls + task.cost(node.particle.level, task.steps) > self.passes * task.steps:
                break
            idle = 0
            while node.depth < len(levels):
                particle = node.particle
                if node.children:
                    particle = particle.fork(task.new_seed()) if node.depth else task.new_particle()
                (particle,) = yield Advance([particle], levels[node.depth])
                node = node.add(particle)
            (score,) = yield Score([node.particle])
            node.value = float(score)
            node.back_up(self.strength)
        return tree

    def choose(self, node: TreeNode, rng: np.random.Generator) -> TreeNode:
        """The child that a descent goes on to."""
        if rng.random() < self.exploration:
            return node.children[int(rng.integers(len(node.children)))]
        return node.children[int(rng.choice(len(node.children), p=child_shares(node, self.strength)))]

    def _may_grow(self, node: TreeNode) -> bool:
        limit = max(1.0, self.width * max(node.visits, 1) ** self.growth)
        return len(node.children) < min(limit, self.children or math.inf)


@dataclass(slots=True, eq=False)
class TreeNode:
    """A particle and its place in the tree."""

    particle: Particle
    depth: int  # 0: the root, which stands for all initial noise
    parent: TreeNode | None = None
    value: float = 0.0
    visits: int = 0
    children: list[TreeNode] = field(default_factory=list)

    def add(self, particle: Particle) -> TreeNode:
        child = TreeNode(particle, self.depth + 1, self)
        self.children.append(child)
        return child

    def back_up(self, strength: float) -> None:
        """Counts a visit of this finished take, and computes the values of its ancestors anew."""
        for node in self.ancestry():
            node.visits += 1
            if node.children:
                node.value = soft_value(np.array([child.value for child in node.children]), strength)

    def ancestry(self) -> Iterator[TreeNode]:
        node: TreeNode | None = self
        while node is not None:
            yield node
            node = node.parent

    def leaves(self, strength: float, share: float = 1.0) -> Iterator[tuple[TreeNode, float]]:
        """The finished takes below, and the probability that a descent by `child_shares` ends there."""
        if not self.children:
            yield self, share
            return
        for child, part in zip(self.children, child_shares(self, strength), strict=True):
            yield from child.leaves(strength, share * part)


def soft_value(values: np.ndarray, strength: float) -> float:
    """(1 / strength) log mean exp(strength values); their mean at strength 0."""
    if strength == 0.0:
        return float(values.mean())
    return float((np.logaddexp.reduce(strength * values) - math.log(len(values))) / strength)


def child_shares(node: TreeNode, strength: float) -> np.ndarray:
    """The probabilities of a node's children, in proportion to exp(strength value)."""
    values = strength * np.array([child.value for child in node.children])
    shares = np.exp(values - values.max())
    return np.asarray(shares / shares.sum())
