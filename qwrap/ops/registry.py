"""Which torch function computes which operator, by domain, type and revision.

A *revision* is named by the opset version that introduced it, the ``since_version`` of its schema:
Softmax has the revisions 1, 11 and 13, so a model of opset 17 uses Softmax-13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.limits import COMMON, Limit

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operator:
    """One registered function.

    Attributes:
        function: inputs positional, attributes keyword-only with the schema's names and defaults.
        host: indices of the inputs that the function wants as Python numbers or (nested) lists,
            because they steer shapes. A negative ``-1`` entry means all inputs.
        literal: indices of the inputs that the function wants as a Python number if they are
            constants of rank 0, else as the tensor they are: it has a faster way for numbers.
        ignored: attributes that never change the result and are no parameters of the function.
        returns_tuple: the function returns a tuple, else one tensor.
        wants_output_count: the function has a keyword ``output_count``: how many of the outputs
            the node names.
        wants_device: the function has a keyword ``device``: where to create what it returns,
            because no input tells.
        wants_dtype: the function has a keyword ``dtype``: the element type of its first output,
            because Python numbers do not tell.
        wants_element_type: the function has a keyword ``element_type``: the ``onnx.TensorProto``
            data type of its first output, None where inference did not find it, because a torch
            type may carry several (see ``element_types``).
        allowed: attribute -> what it may hold, beside ``limits.COMMON``.
        absent: indices of the inputs that must be left out -> their names.
        check: is called with the attributes, once for each node, and raises what is wrong with
            them together.
        prepare: makes of the attributes, once for each node, what the function takes as its
            keyword ``prepared``; raises what is wrong with them. None: it takes them as they are.
    """

    function: Callable[..., Any]
    host: tuple[int, ...] = ()
    literal: tuple[int, ...] = ()
    ignored: frozenset[str] = frozenset()
    returns_tuple: bool = False
    wants_output_count: bool = False
    wants_device: bool = False
    wants_dtype: bool = False
    wants_element_type: bool = False
    allowed: Mapping[str, Limit] = field(default_factory=dict)
    absent: Mapping[int, str] = field(default_factory=dict)
    check: Callable[..., None] | None = None
    prepare: Callable[..., Any] | None = None

    def wants_host(self, index: int) -> bool:
        """Whether input ``index`` is handed over as a Python value."""
        return index in self.host or -1 in self.host

    def keywords(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a node that the function takes as keywords."""
        return {name: value for name, value in attributes.items() if name not in self.ignored}

    def bind(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords to call the function with, from all attributes of a node."""
        given = self.keywords(attributes)
        return given if self.prepare is None else {"prepared": self.prepare(**given)}

    def refusals(self, attributes: Mapping[str, Any], inputs: Sequence[object]) -> list[str]:
        """Return a complaint for each thing that a node says and the function cannot follow.

        Args:
            attributes: of the node.
            inputs: of the node, None where one is left out.
        """
        complaints = [
            f"{name}={[*value] if isinstance(value, tuple) else value!r}; expected {limit.expected}"
            for name, value in attributes.items()
            if (limit := self.allowed.get(name)) is not None and not limit.allows(value)
        ]
        complaints += [
            f"has an input {name!r}, which is not supported"
            for index, name in self.absent.items()
            if index < len(inputs) and inputs[index] is not None
        ]
        if self.check is not None and not complaints:
            try:
                self.check(**attributes)
            except ModelError as error:
                complaints.append(str(error))
        return complaints


ONNX_DOMAINS = ("", "com.microsoft")
Key = tuple[str, str, int]  # domain, operator type, revision
_OPERATORS: dict[Key, Operator] = {}
_KEYS: dict[object, Key] = {}


def op(
    op_type: str,
    since: Sequence[int],
    *,
    domain: str = "",
    host: tuple[int, ...] = (),
    literal: tuple[int, ...] = (),
    ignored: tuple[str, ...] = (),
    allowed: Mapping[str, Limit] | None = None,
    absent: Mapping[int, str] | None = None,
    check: Callable[..., None] | None = None,
    prepare: Callable[..., Any] | None = None,
    replace: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function for the revisions ``since`` of ``domain::op_type``.

    With ``replace``, it may take the place of another one.
    """

    def register(function: Function) -> Function:
        # Functions of torch itself are registered as they are; they have neither dictionary.
        names = getattr(function, "__kwdefaults__", None) or {}
        types = getattr(function, "__annotations__", {})
        returned = types.get("return", "")
        record = Operator(
            function=function,
            host=host,
            literal=literal,
            ignored=frozenset((*ignored, "consumed_inputs")),  # opset 1: a hint to work in place
            returns_tuple=returned is tuple or str(returned).startswith("tuple"),
            wants_output_count="output_count" in names,
            wants_device="device" in names,
            wants_dtype="torch.dtype" in str(types.get("dtype", "")),  # ints are attributes
            wants_element_type="element_type" in names,
            allowed={**(COMMON if domain in ONNX_DOMAINS else {}), **(allowed or {})},
            absent=absent or {},
            check=check,
            prepare=prepare,
        )
        for version in since:
            key = (domain, op_type, version)
            assert replace or key not in _OPERATORS, f"{key} registered twice"
            _OPERATORS[key] = record
            _KEYS.setdefault(function, key)
        return function

    return register


def revision(domain: str, op_type: str, opset: int) -> int | None:
    """Return the revision of ``op_type`` that a model importing ``opset`` uses, None if none."""
    try:
        return int(onnx.defs.get_schema(op_type, opset, domain).since_version)
    except onnx.defs.SchemaError:
        versions = registered(domain, op_type)
        return max((v for v in versions if v <= opset), default=None)


def registered(domain: str, op_type: str) -> list[int]:
    """Return the registered revisions of an operator, ascending."""
    return sorted(v for d, t, v in _OPERATORS if (d, t) == (domain, op_type))


def find(domain: str, op_type: str, opset: int) -> Operator | None:
    """Return what computes ``op_type`` in a model importing ``opset``, None if nothing does."""
    since = revision(domain, op_type, opset)
    return None if since is None else _OPERATORS.get((domain, op_type, since))


def key_of(function: object) -> Key | None:
    """Return under what ``function`` is registered, None if it is not; a name that can be saved."""
    return _KEYS.get(function)


def function_of(key: Key) -> Callable[..., Any]:
    """Return the function registered under ``key``.

    Raises:
        UnsupportedOpError: none is.
    """
    if key not in _OPERATORS:
        domain, op_type, since = key
        raise UnsupportedOpError(
            f"the model uses {domain or 'ai.onnx'}::{op_type}-{since}, which is not registered; "
            "call qwrap.register_op before loading a pickled model"
        )
    return _OPERATORS[key].function


def operators() -> Iterator[tuple[str, str, int]]:
    """Yield ``(domain, op_type, since_version)`` of everything registered."""
    yield from _OPERATORS
