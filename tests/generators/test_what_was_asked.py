"""What a pipeline makes is what was asked for, and replicas share no cache that two threads could wait on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import CannotRun
from pipeline.generators.policy_pipeline import check_made
from pipeline.learner.replica import Replica


def config(**sections) -> Config:
    data = {"generator": {"pretrained": "x"}, "prompts": {"train": "p.txt"}, "rewards": {"r": {"scorer": "jpeg"}}}
    return Config.model_validate({**data, **sections})


class APipeline:
    def __call__(self, prompt=None, num_frames=1, height=None, width=None):
        """Makes nothing."""


class AnUpscaler:
    def __call__(self, prompt=None, image=None):
        """Makes nothing."""


def asked_for(frames, height, width):
    return config(generator={"pretrained": "x", "num_frames": frames, "height": height, "width": width}).generator


def takes_of(*shape):
    return np.zeros((2, *shape, 3), np.float32)


@pytest.mark.parametrize(
    "asked, made, fix",
    [
        ((10, 48, 64), (9, 48, 64), "set generator.num_frames=9, which"),
        ((2, 48, 64), (1, 48, 64), "made 1 frame of 64x48 where 2 frames of 64x48"),
        ((1, 36, 40), (1, 32, 40), "set generator.height=32, which"),
        ((9, 100, 100), (8, 96, 104), "generator.num_frames=8, generator.height=96, generator.width=104"),
    ],
)
def test_other_frames_than_were_asked_for_are_refused_with_what_can_be_made(asked, made, fix):
    with pytest.raises(CannotRun) as error:
        check_made(APipeline(), asked_for(*asked), takes_of(*made))
    assert fix in str(error.value)
    check_made(APipeline(), asked_for(*asked), takes_of(*asked))


def test_what_a_pipeline_is_not_asked_for_is_not_compared_and_more_frames_are_logged_once(caplog):
    check_made(AnUpscaler(), asked_for(1, 16, 16), takes_of(1, 32, 32))
    for _ in range(2):
        check_made(APipeline(), asked_for(5, 16, 16), takes_of(37, 16, 16))
    assert [record.message for record in caplog.records if "37 frames" in record.message] == [caplog.records[0].message]


@pytest.mark.parametrize("replicas, cached", [(1, True), (2, False)])
def test_several_replicas_cast_without_autocasts_cache(replicas, cached):
    """Its lock is held by a thread that traces a graph while it waits for the GIL, and is taken by whoever leaves
    autocast while holding the GIL: `generator.compile` with two replicas hung before the first step."""
    replica = object.__new__(Replica)
    replica.cfg, replica.device = config(learner={"replicas": replicas, "autocast": "bfloat16"}), torch.device("cpu")
    seen = SimpleNamespace(model_output=lambda x: (torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")))
    assert replica.output(seen, torch.zeros(1)) == (cached, True)
