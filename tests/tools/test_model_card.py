"""The model card of an export, from a made-up run."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from made_up_run import make_run

from pipeline.config.load import load_config
from pipeline.generators.checkpoint_files import LORA_FILE
from pipeline.tools.model_card import usage, write_card

HUB = "owner/base"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("card"))
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    for row, means in zip(rows, ([0.1, 0.3], [0.2, 0.4], [0.3, 0.7]), strict=True):
        row["rewards"]["scene"]["prompt_means"] = means
    rows[-1]["verdict"] = {"kind": "suspect", "text": "suspect: brightness (0.5 → 0.9)"}
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LORA_FILE).touch()
    return tmp_path / "out"


def config_of(run, **generator):
    cfg = load_config(run / "config.yaml")
    return cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"pretrained": HUB, **generator})})


def test_front_matter_and_results(run, exported):
    text = write_card(run, exported, config_of(run), 40).read_text()
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["base_model"] == HUB and matter["base_model_relation"] == "adapter"
    assert matter["library_name"] == "diffusers" and matter["pipeline_tag"] == "text-to-video"
    assert {"rushes", "lora", "text-to-video"} <= set(matter["tags"])
    [row] = re.findall(r"^\| scene .*$", text, re.M)
    assert row.endswith("| +0.300 ± 0.100 |") and "| weighted sum |" in text  # of the pairs 0.2 and 0.4
    assert "Verdict of the last evaluation: suspect: brightness (0.5 → 0.9)." in text.replace("\\", "")
    assert text.count('<video src="card/') == 8 and len(list((exported / "card").glob("*.mp4"))) == 8
    assert (exported / "card/reward.png").stat().st_size > 1000
    assert str(run.parent) not in text  # no path of this machine


def test_an_earlier_step_shows_that_steps_numbers(run, exported):
    text = write_card(run, exported, config_of(run), 20).read_text()
    assert "after 20 steps of" in text and "| prompt | before | step 20 |" in text


def test_without_evaluations_there_is_no_table(tmp_path, exported):
    run = make_run(tmp_path, steps=0)
    text = write_card(run, exported, config_of(run), 0).read_text()
    assert "## Results" not in text and "## Takes" not in text and "## Use" in text


def test_prompts_are_text_in_tables_and_code(run, exported):
    from pipeline.tools.model_card import cell_text

    assert cell_text("a | b\n<script>[x](y)") == r"a \| b &lt;script&gt;\[x\]\(y\)"
    code = usage(exported, config_of(run), 'a "red" \n```circle')
    compile(code, "card", "exec")
    assert "\n```" not in code


def test_code_of_conditions_guidance_and_revisions(run, exported):
    code = usage(exported, config_of(run, pipeline="WanImageToVideoPipeline", revision="abc"), "x")
    compile(code, "card", "exec")
    assert "from diffusers import WanImageToVideoPipeline" in code and "image=picture" in code
    assert "revision='abc'" in code and "guidance_scale=1.0" in code
    assert "true_cfg_scale=" in usage(exported, config_of(run, pipeline="QwenImagePipeline"), "x")


def test_the_licence_is_the_bases(run, exported, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: mit\n")
    text = write_card(run, exported, config_of(run, pretrained=str(tmp_path / "base")), 40).read_text()
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["license"] == "apache-2.0" and "base_model" not in matter
