"""Loads a diffusers checkpoint: pipeline, denoisers, caches, compilation, offload."""
