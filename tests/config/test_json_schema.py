"""The JSON schema of configs: it accepts every recipe, and what pydantic refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config.json_schema import config_schema
from pipeline.config.parts import PARTS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("**/*.yaml"))


@pytest.fixture(scope="module")
def validator():
    schema = config_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_committed_schema_is_current():
    assert json.loads((CONFIGS / "schema.json").read_text("utf-8")) == config_schema(), "run: make docs"


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_names_the_schema_and_fits_it(recipe, validator):
    text = recipe.read_text("utf-8")
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", text.splitlines()[0])
    assert named and (recipe.parent / named[1]).resolve() == CONFIGS / "schema.json"
    assert not list(validator.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "change",
    [
        {"runn": {}},
        {"run": {"stepps": 3}},
        {"step": {"takes": "four"}},
        {"step": {"takes": -1}},
        {"objective": {"name": "no-such"}},
        {"objective": {"name": "awm", "clip_low": 0.1}},  # an option of grpo
        {"generator": {"pretrained": "x", "dtype": "float8"}},
        {"rewards": {}},
    ],
    ids=str,
)
def test_mistakes_do_not_fit(change, validator):
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text("utf-8"))
    assert list(validator.iter_errors({**recipe, **change}))


def test_every_part_can_be_chosen(validator):
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text("utf-8"))
    for section, registry in PARTS.items():
        for name, part in registry.all().items():
            if all(not field.is_required() for field in part.model_fields.values()):
                assert not list(validator.iter_errors({**recipe, section: {"name": name}})), (section, name)
