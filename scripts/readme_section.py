"""The places of the README that scripts write."""

from __future__ import annotations

import re
from pathlib import Path


def update_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between the comments ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        SystemExit: the comments are missing.
    """
    old = path.read_text(encoding="utf-8")
    section = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not section.search(old):
        raise SystemExit(f"{path}: found no <!-- {name} --> … <!-- /{name} --> to write between")
    new = section.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old)
    path.write_text(new, encoding="utf-8")
