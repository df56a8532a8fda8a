"""A diffusers checkpoint as an RL policy: load, record, replay."""
