"""Why a node stays as it is."""

from __future__ import annotations


class Unfit(Exception):  # noqa: N818 (a refusal, which the caller reports, not an error)
    """A node cannot be quantized; the message completes "is left as it is: "."""
