"""Results as JSON files: written all or nothing, and read without executing anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qwrap.errors import StatisticsError
from qwrap.graph.save import check_target, replace_text

T = TypeVar("T")


def write_document(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        ExportError: the folder does not exist or cannot be written to.
    """
    check_target(path)
    replace_text(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_document(path: str | os.PathLike[str], take: Callable[[Any], T]) -> T:
    """Return what ``take`` makes of the content of a JSON file.

    Raises:
        StatisticsError: the file cannot be read, or ``take`` refuses it.
    """
    try:
        return take(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise StatisticsError(f"{os.fspath(path)}: cannot be read: {error}") from error
    except StatisticsError as error:
        raise StatisticsError(f"{os.fspath(path)}: {error}") from error


def check_kind(content: Any, form: str, version: int, what: str) -> None:
    """Refuse content of another kind, or of a later version of its form.

    Raises:
        StatisticsError: with the reason.
    """
    if not isinstance(content, dict) or content.get("format") != form:
        raise StatisticsError(f"no {what} that qwrap wrote")
    if content.get("version") != version:
        raise StatisticsError(
            f"version {content.get('version')} of the format; this qwrap reads {version}"
        )
