"""What `rushes push` uploads: the files of an export, with its texts as they must read on the hub."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import InputError, RushesError, one_line
from pipeline.core.reading import MAX_YAML, read_text
from pipeline.core.safe_paths import not_regular
from pipeline.core.secrets import register
from pipeline.generators.checkpoint_files import ADAPTER_FILE, is_local, lora_files, styled_files
from pipeline.generators.export_folder import load_lines

CARD = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"


def check_repo(repo: str) -> None:
    """Raises InputError for a text that is no owner/name."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    if not re.fullmatch(rf"{part}/{part}", repo) or ".." in repo or "--" in repo:
        raise InputError(f"REPO: found {repo!r:.120}; expected owner/name, such as my-name/my-model")


def export_files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of an export with a model card. Raises InputError for other folders, and for
    links and special files, which could lead anywhere."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it with: rushes export RUN")
    full = (folder / "model_index.json").is_file()
    if not (full or lora_files(folder) or styled_files(folder)) or not (folder / CARD).is_file():
        raise InputError(f"{folder}: is no export with a model card ({CARD}); make one with: rushes export RUN")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or (not path.is_dir() and not_regular(path)):
            raise InputError(f"{path}: is a link or no regular file; an export has none: export again")
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            files[name.as_posix()] = path
    return files


def hub_texts(folder: Path, files: Mapping[str, Path], repo: str, base: str | None) -> dict[str, bytes]:
    """The texts that read otherwise on the hub than in the folder: the card loads from `repo`, and a base that is a
    folder of this machine becomes `base`, a hub id. Raises InputError where it is needed and missing."""
    card = read_text(folder / CARD, MAX_YAML, InputError)
    local_base = _local_base(folder, card)
    if local_base is not None and base is None:
        raise InputError(
            f"{folder}: its base model is {local_base}, a folder of this machine, which others cannot load; name it on "
            "the hub with --base owner/name, or push a full export (rushes export RUN --format full)"
        )
    for here, there in zip(load_lines(folder), load_lines(folder, repo), strict=True):
        card = card.replace(here, there)
    card = card.replace(".from_pretrained('.'", f".from_pretrained({repo!r}")
    texts = {}
    if local_base is not None and base is not None:
        card = _with_base(card.replace(repr(local_base), repr(base)), base)
        for name, path in files.items():
            if path.name == _ADAPTER_CONFIG:
                settings = json.loads(read_text(path, MAX_YAML, InputError))
                texts[name] = json.dumps({**settings, "base_model_name_or_path": base}, indent=2).encode()
    return {CARD: card.encode(), **texts}


def _local_base(folder: Path, card: str) -> str | None:
    """The base that the card's code loads, where it is a folder of this machine."""
    found = re.search(r"""\.from_pretrained\(('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", card)
    base = ast.literal_eval(found[1]) if found else "."
    for path in folder.rglob(_ADAPTER_CONFIG):
        if (path.parent / ADAPTER_FILE).is_file():
            named = json.loads(read_text(path, MAX_YAML, InputError)).get("base_model_name_or_path")
            base = named if isinstance(named, str) else base
    return base if base != "." and is_local(base) else None


def _with_base(card: str, base: str) -> str:
    """The card with `base_model` in its front matter."""
    found = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    matter: dict[str, Any] = yaml.safe_load(found[1]) if found else {}
    matter.update(base_model=base, base_model_relation="adapter")
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n{card[found.end() :] if found else card}"


def upload(repo: str, files: Mapping[str, Path], texts: Mapping[str, bytes], private: bool, message: str) -> str:
    """One commit with all files; makes the repository if it is not there. Returns the commit's URL.

    Raises RushesError, in one line without the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = get_token()
    if token is None:
        raise InputError("push: no token for the hub; set HF_TOKEN (with write access), or run: hf auth login")
    register(token)
    api = HfApi(token=token, library_name="rushes")
    contents: dict[str, Any] = {**files, **texts}
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        fix = {401: "is HF_TOKEN right?", 403: "has HF_TOKEN write access there?"}.get(status or 0, "try again")
        raise RushesError(f"push: the hub answered {status} ({one_line(error, 200)}); {fix}") from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise RushesError(f"push: the upload to {api.endpoint} failed ({one_line(error, 200)}); try again") from error
