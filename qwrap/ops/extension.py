"""Operators that the user brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qwrap.errors import ConfigError
from qwrap.ops.registry import op, registered

Function = TypeVar("Function", bound=Callable[..., Any])


def register_op(
    domain: str,
    op_type: str,
    since: int | Sequence[int] = 1,
    *,
    host: Sequence[int] = (),
    ignored: Sequence[str] = (),
    replace: bool = False,
) -> Callable[[Function], Function]:
    """Return a decorator that makes a torch function the implementation of an operator.

    Models loaded from then on use it. Its positional parameters are the ONNX inputs: tensors (see
    ``WrappedModel.forward`` for what else there is), None where a node leaves one out. Its
    keyword-only parameters are the attributes, with their defaults: numbers, text or lists of
    them, tensors. An attribute that is no parameter is refused when a model is loaded. It returns
    a tensor, or a tuple of them, annotated ``-> tuple[...]``, if the operator has several outputs.
    Gradients flow as far as autograd follows it. A pickled model finds it by domain, type and
    revision: register it before unpickling.

    Args:
        domain: of the operator; ``""`` for ai.onnx.
        op_type: name of the operator.
        since: the revisions (schema ``since_version``) that the function is right for.
        host: indices of the inputs to hand over as Python numbers or lists, for they steer shapes.
        ignored: attributes that do not change the result and are no parameters of the function.
        replace: take the place of an implementation that is there.

    Raises:
        ConfigError: there is one already, and ``replace`` is not set.
    """
    versions = [since] if isinstance(since, int) else list(since)
    domain = "" if domain == "ai.onnx" else domain
    taken = sorted(set(versions) & set(registered(domain, op_type)))
    if taken and not replace:
        raise ConfigError(
            f"{domain or 'ai.onnx'}::{op_type} has revisions {taken} already; pass replace=True to "
            "take their place"
        )
    return op(
        op_type, versions, domain=domain, host=tuple(host), ignored=tuple(ignored), replace=replace
    )
