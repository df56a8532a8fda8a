"""Every file and module of this repository that a page of documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_examples import ROOT, doc_examples

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("actors", "benchmarks", "configs", "docs", "jobs", "k8s", "models", "pipeline", "tests")
PACKAGES = ("actors", "benchmarks", "jobs", "pipeline")
# Placeholders, and files that the reader writes.
NOT_HERE = {"configs/NAME.yaml", "k8s/overlays/mine/kustomization.yaml", *doc_examples()}


def missing_paths(page: str) -> list[str]:
    paths = {path.rstrip(".,-") for path in re.findall(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./-]+", page)}
    return sorted(
        path for path in paths - NOT_HERE if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()
    )


def missing_links(page: str, folder: Path) -> list[str]:
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page) if "://" not in target}
    return sorted(target for target in targets if not (folder / target).exists())


def missing_modules(page: str) -> list[str]:
    """Dotted names from a package on; the last part may be a function or class of the module."""
    names = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+", page))
    paths = {name: ROOT.joinpath(*name.split(".")) for name in names}
    return sorted(name for name, path in paths.items() if not any(_is_module(p) for p in (path, path.parent)))


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() and path.parent != ROOT


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(path):
    page = path.read_text()
    assert [*missing_paths(page), *missing_links(page, path.parent), *missing_modules(page)] == []


def test_what_does_not_exist_is_noticed():
    page = "see `pipeline/core/nothing.py`, [that](nowhere.md) and `python -m jobs.nothing.at_all`; k8s/base is there"
    assert missing_paths(page) == ["pipeline/core/nothing.py"]
    assert missing_links(page, ROOT) == ["nowhere.md"]
    assert missing_modules(page) == ["jobs.nothing.at_all"]
