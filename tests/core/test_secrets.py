"""Secrets are masked at every sink, whichever way they came in; words that are none stay."""

import html
import json
import logging
import sys
import urllib.parse

import pyarrow.parquet as pq
import pytest
import yaml
from command import run as command
from fake_checkpoint import fake_config
from made_up_run import make_run
from PIL import Image

from jobs.common.options import make_console
from jobs.launch.summary import summarise
from pipeline.config.load import load_config, to_yaml
from pipeline.core import secrets
from pipeline.core.errors import ConfigError, one_line
from pipeline.core.reading import shown
from pipeline.rewards.models.web import JsonClient
from pipeline.runs.log import setup_logging
from pipeline.runs.paths import RunDir
from pipeline.tools.preflight import check_rewards

SECRETS = ['env"pa$$w0rd&x y', "named-by-api_key_env", "v4lue/of+env_vars", "<under a key's name>"]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(secrets, "_registered", set())


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A config through which, and through whose environment, a secret comes in in each way."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS[0])
    monkeypatch.setenv("MINE", SECRETS[1])
    reward = {
        "scorer": "jpeg_compressibility",
        "args": {"api_key_env": "MINE", "nested": [{"service_token": SECRETS[3]}]},
        "runtime_env": {"env_vars": {"ANY_NAME": SECRETS[2], "HF_HOME": "/data/hf", "THREADS": "12345678"}},
    }
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(fake_config(tmp_path, rewards={"r": reward}).model_dump(mode="json")))
    return path


def leaks(text: str) -> list[str]:
    """Secrets that are in the text, in any form."""

    def forms(secret: str) -> list[str]:
        return [secret, html.escape(secret), urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1]]

    return [secret for secret in SECRETS if any(form in text for form in forms(secret))]


def test_no_sink_shows_a_secret(config, capsys, tmp_path):
    cfg, everything = load_config(config), " | ".join(SECRETS)
    # 1. stdout, stderr, also with a traceback
    with secrets.masked_streams():
        print("to stdout:", everything, urllib.parse.quote(everything, safe=""))
        print("to stderr:", json.dumps(everything), file=sys.stderr)
    for text in capsys.readouterr():
        assert leaks(text) == [] and text.count("***") >= len(SECRETS)
    for secret in SECRETS:
        status, out, err = command(capsys, "config", config, "--debug", f"run.dri={json.dumps(secret)}")
        assert status == 2 and leaks(out + err) == []
    # 2. config.yaml, and the command that prints it
    kept = yaml.safe_load(to_yaml(cfg))
    assert leaks(to_yaml(cfg)) == [] and kept["run"] == cfg.model_dump(mode="json")["run"]
    assert kept["rewards"]["r"]["runtime_env"]["env_vars"] == {
        "ANY_NAME": "***", "HF_HOME": "/data/hf", "THREADS": "12345678",
    }  # fmt: skip
    status, out, err = command(capsys, "config", config)
    assert status == 0 and leaks(out + err) == []
    # 3. run.log
    run = RunDir(make_run(tmp_path, steps=2))
    setup_logging(run, "driver")
    logging.getLogger("rushes.test").error("to the log: %s", everything)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == "rushes run.log"]:
        root.removeHandler(handler)
        handler.close()
    assert leaks(run.log.read_text()) == [] and "to the log: *** | ***" in run.log.read_text()
    # 4. summary.json, and the report: also of a run whose config.yaml was written with secrets
    run.config.write_text(config.read_text())
    result = {"evals": [], "missing": [f"tracker x: {everything}"], "checkpoint": None, "export": f"/{everything}"}
    result |= {"step": 2, "takes": 4, "groups": {}, "retries": 0, "peaks": {}}
    with secrets.masked_streams():
        summarise(cfg, run, result, 0, make_console())
    assert leaks(run.summary.read_text()) == [] and leaks(run.report.read_text()) == []
    assert leaks("".join(capsys.readouterr())) == []
    # 5. what error messages are cut to
    for cut in (one_line, shown):
        for secret in SECRETS:
            assert secret[:6] not in cut("x" * 50 + secret, 60)
    # 6. trackers
    assert leaks(json.dumps(secrets.mask_tree(cfg.model_dump(mode="json")))) == []


def test_a_rewards_own_words_are_masked_in_the_table_and_on_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", SECRETS[0])
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    mine = tmp_path / "mine.py"
    mine.write_text("import os\ndef score(frames, prompt):\n    raise ValueError(os.environ['SERVICE_PASSWORD'])\n")
    status, out, err = command(capsys, "score", tmp_path, "-r", f"{mine}:score", "-o", tmp_path / "s.parquet")
    (row,) = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert status == 1 and leaks(out + err + row["error"]) == [] and "***" in row["error"]


@pytest.mark.parametrize(
    "text, shown_as",
    [
        ("see http://me:secret@host:1/x?y=1", "see http://***@host:1/x?y=1"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "(private key) ***"),
        ("hf_" + "a" * 30, "***"),
        ("step 3: 12 tokens, the key `rewards.a.args.api_key_env`, mail a@b.org, s3://bucket/a@b", None),
    ],
)
def test_forms_that_tell_by_themselves(text, shown_as):
    assert secrets.mask(text) == (text if shown_as is None else shown_as)


def test_ordinary_values_of_such_names_stay(monkeypatch):
    for name, value in [("TOKENIZERS_PARALLELISM", "false"), ("SOME_TOKEN", "default"), ("SSH_KEY", "/home/me/key")]:
        monkeypatch.setenv(name, value)
    text = "false default /home/me/key"
    assert secrets.mask(text) == text
    plain = {"tokenizer": "bert-base-uncased", "api_key_env": "MY_KEY", "max_tokens": 7}
    assert secrets.mask_tree(plain) == plain


@pytest.mark.parametrize(
    "key, url",
    [
        ("rewards.r.args.url", "http://me:secret@host/score"),
        ("rewards.r.args.url", "https://s3cretT0ken@host/score"),
        ("rewards.r.args.url", "https://host/score?api_key=s3cret"),
        ("rewards.r.args.list", "[ftp://me:secret@host]"),
        ("rewards.r.runtime_env.pip", "[git+https://ghp_x@github.com/a/b]"),
        ("generator.pretrained", "https://me:secret@hub/x"),
        ("run.dir", "s3://key:secret@bucket/runs"),
        ("ray.address", "ray://me:secret@head:10001"),
    ],
)
def test_a_config_refuses_secrets_in_urls(tmp_path, capsys, key, url):
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(fake_config(tmp_path)))
    status, out, err = command(capsys, "config", path, "rewards.r.scorer=http", f"{key}={url}")
    assert status == 2 and f"{key}: holds credentials" in err and "ecret" not in out + err and err.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["ssh://git@github.com/a/b", "http://host/a@b", "s3://bucket/x?region=eu", "http://h:1"]
)
def test_urls_without_secrets_are_fine(url):
    assert list(secrets.credentials_in_urls({"args": {"url": url}})) == []


def test_a_scorer_given_on_the_command_line_refuses_them_too():
    with pytest.raises(ConfigError, match="holds credentials") as error:
        JsonClient("http://me:hunter22@host")
    assert "hunter22" not in str(error.value)


def test_a_masked_config_is_not_run(tmp_path):
    """A run's config.yaml given as a config: *** would go to the scorer as the secret."""
    reward = {"scorer": "jpeg_compressibility", "runtime_env": {"env_vars": {"A_TOKEN": "s3cret-s3cret"}}}
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(fake_config(tmp_path, rewards={"r": reward})))
    with pytest.raises(ConfigError, match=r"rewards.r.runtime_env.env_vars.A_TOKEN: found \*\*\*"):
        check_rewards(load_config(path))
