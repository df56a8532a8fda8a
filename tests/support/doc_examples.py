"""The files that docs/extending.md shows in full: code blocks that begin with `# <path>`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def doc_examples() -> dict[str, str]:
    """Path in the repository -> source."""
    text = (ROOT / "docs/extending.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n# (\S+/\S+\.py)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return dict(blocks)
