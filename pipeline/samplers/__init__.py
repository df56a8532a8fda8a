"""Stochastic sampler steps and their log-probabilities."""

from pipeline.samplers.transition import Transition, log_prob, transition

__all__ = ["Transition", "log_prob", "transition"]
