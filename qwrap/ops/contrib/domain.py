"""The operator set com.microsoft, which onnxruntime's optimizers and quantizers write.

It has one version. The onnx package knows no schema of it; names, attributes and defaults are those
of onnxruntime's ``docs/ContribOperators.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qwrap.ops.limits import Limit
from qwrap.ops.registry import Function, op

DOMAIN = "com.microsoft"


def microsoft(
    op_type: str,
    *,
    host: tuple[int, ...] = (),
    ignored: tuple[str, ...] = (),
    allowed: Mapping[str, Limit] | None = None,
    absent: Mapping[int, str] | None = None,
    check: Callable[..., None] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function in ``DOMAIN``; see ``registry.op``."""
    return op(
        op_type,
        since=(1,),
        domain=DOMAIN,
        host=host,
        ignored=ignored,
        allowed=allowed,
        absent=absent,
        check=check,
    )
