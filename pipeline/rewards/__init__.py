"""Rewards: from a config entry and media to one score per take. One file per scorer, in `pipeline.rewards.scorers`.

`base` is what a scorer is, `registry` finds scorers and checks their options, `runner` scores media with one reward of
the config; `segments`, `repeats`, `routing` and `batching` say on which frames, how often, for which prompts, and with
which other groups.
"""
