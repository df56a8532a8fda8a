"""Puts the recipes and the models that ship into the wheel, as pipeline/shipped (`pipeline.core.shipped` finds them).
Everything else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Not in an editable installation, which uses the repository's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ("configs", "models"):
                shutil.copytree(name, Path(self.build_lib) / "pipeline" / "shipped" / name, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
