"""Stochastic sampler steps and their log-probabilities."""

from pipeline.rl.samplers.transition import Transition, log_prob, transition

__all__ = ["Transition", "log_prob", "transition"]
