"""Runs a pipeline unchanged while its denoiser calls and scheduler steps are recorded."""
