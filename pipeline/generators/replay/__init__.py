"""Replays recorded denoiser calls in the learner."""
