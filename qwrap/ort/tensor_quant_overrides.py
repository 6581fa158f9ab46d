"""What users say of single tensors: ``extra_options["TensorQuantOverrides"]``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, overload

from onnx import TensorProto

from qwrap.ort.enums import QuantType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.override_rules import NOT_WITH_SCALE, faults

Entry = dict[str, Any]


@dataclass(eq=False)
class QuantTypeInfo:
    """The type that a node makes or wants of a tensor; None leaves a setting to the defaults.

    Two are equal if no setting that both give differs.

    Attributes:
        quant_type: type of the codes.
        symmetric: whether the zero point is the middle code.
        reduce_range: whether half of the codes are used.
        axis: along which channels run; None for one scale.
    """

    quant_type: QuantType | None
    symmetric: bool | None = None
    reduce_range: bool | None = None
    axis: int | None = None

    __hash__ = None  # type: ignore[assignment]  # equality is not transitive

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantTypeInfo):
            return NotImplemented
        return (
            self.quant_type == other.quant_type
            and self.axis == other.axis
            and _agree(self.symmetric, other.symmetric)
            and _agree(self.reduce_range, other.reduce_range)
        )

    @staticmethod
    def load_from_dict(
        raw_dict: Mapping[str, Any],
        default_qtype: QuantType | None = None,
        default_symmetric: bool | None = None,
        default_reduce_range: bool | None = None,
    ) -> QuantTypeInfo:
        """Return what an entry of the overrides says, and the defaults for the rest."""
        return QuantTypeInfo(
            raw_dict.get("quant_type", default_qtype),
            raw_dict.get("symmetric", default_symmetric),
            raw_dict.get("reduce_range", default_reduce_range),
            raw_dict.get("axis"),
        )

    def save_to_dict(self, raw_dict: Entry) -> None:
        """Write it into an entry of the overrides, in place."""
        raw_dict["quant_type"] = self.quant_type
        for key in ("symmetric", "reduce_range", "axis"):
            if getattr(self, key) is not None:
                raw_dict[key] = getattr(self, key)


def _agree(first: bool | None, second: bool | None) -> bool:
    return first is None or second is None or first == second


class TensorQuantOverridesHelper(MutableMapping[str, list[Entry]]):
    """Overrides as a mapping, tensor -> list of dictionaries, with questions answered about them.

    It is a view: what is changed here is changed in the dictionary that it was made of.

    Attributes:
        overrides: the dictionary.
        quant_types: the types it names, once they have been asked for.
    """

    def __init__(self, raw_overrides: dict[str, list[Entry]]) -> None:
        self.overrides = raw_overrides
        self.quant_types: set[QuantType] | None = None
        self.keys_unsupported_with_scale_zp = set(NOT_WITH_SCALE)

    def _first(self, tensor_name: str) -> Entry | None:
        entries = self.overrides.get(tensor_name)
        return entries[0] if entries else None

    def has_per_tensor_overrides(self, tensor_name: str) -> bool:
        """Return whether anything is said of a tensor, without an axis."""
        first = self._first(tensor_name)
        return first is not None and first.get("axis") is None

    def has_per_channel_overrides(self, tensor_name: str) -> bool:
        """Return whether anything is said of a tensor, with an axis."""
        first = self._first(tensor_name)
        return first is not None and first.get("axis") is not None

    def overrides_scale_zp(self, tensor_name: str) -> bool:
        """Return whether scale and zero point of a tensor are given."""
        first = self._first(tensor_name) or {}
        return "scale" in first and "zero_point" in first

    @overload
    def get_per_tensor_overrides(self, tensor_name: str, default_val: Entry) -> Entry: ...

    @overload
    def get_per_tensor_overrides(
        self, tensor_name: str, default_val: Entry | None = None
    ) -> Entry | None: ...

    def get_per_tensor_overrides(
        self, tensor_name: str, default_val: Entry | None = None
    ) -> Entry | None:
        """Return what is said of a tensor with one scale, ``default_val`` if nothing is.

        Raises:
            QuantizationError: it is said of channels (a ``ValueError``).
        """
        if self.has_per_channel_overrides(tensor_name):
            raise QuantizationError(
                f"Expected tensor '{tensor_name}' to use per-tensor quantization overrides, "
                "but found per-channel overrides."
            )
        first = self._first(tensor_name)
        return default_val if first is None else first

    def get_per_channel_overrides(
        self, tensor_name: str, default_val: list[Entry] | None = None
    ) -> list[Entry] | None:
        """Return what is said of a tensor's channels, ``default_val`` if nothing is.

        Raises:
            QuantizationError: there is no axis (a ``ValueError``).
        """
        entries = self.overrides.get(tensor_name) or default_val
        if not entries:
            return None
        if entries[0].get("axis") is None:
            raise QuantizationError(
                f"Expected tensor '{tensor_name}' to have per-channel quantization overrides "
                "(axis value is missing)."
            )
        return entries

    def get_quant_types(self) -> set[QuantType]:
        """Return all types that are named, also those to convert to."""
        if self.quant_types is None:
            self.quant_types = set(named_types(self.overrides))
        return self.quant_types

    def is_valid(
        self,
        initializers: Mapping[str, TensorProto],
        activation_names: Collection[str],
        default_activation_qtype: Any,
    ) -> tuple[bool, str | None]:
        """Return whether all entries make sense for a model, and the first fault if one does not.

        Args:
            initializers: the model's constants by name.
            activation_names: names of its other tensors.
            default_activation_qtype: type of activations of which nothing is said.
        """
        self.quant_types = None
        wrong = next(
            faults(self.overrides, initializers, activation_names, default_activation_qtype), None
        )
        return wrong is None, wrong

    def update_tensor_overrides(
        self,
        tensor_name: str,
        new_vals: Entry,
        channels: Iterable[int] | None = None,
        overwrite: bool = True,
    ) -> bool:
        """Set values in the entries of a tensor; return whether it was done.

        Args:
            tensor_name: whose entries are changed; one is made if there is none.
            new_vals: keys with values.
            channels: indices of the entries, None for all.
            overwrite: if False, nothing is done where one of the keys is there already.
        """
        if not new_vals:
            return False
        entries = self.overrides.get(tensor_name) or [{}]
        chosen = range(len(entries)) if channels is None else set(channels)
        touched = [entry for index, entry in enumerate(entries) if index in chosen]
        if not overwrite and any(not entry.keys().isdisjoint(new_vals) for entry in touched):
            return False
        for entry in touched:
            entry.update(new_vals)
        self.overrides[tensor_name] = entries
        self.quant_types = None
        return True

    def get_node_output_qtype_info(
        self,
        output_name: str,
        default_qtype: QuantType | None,
        default_symmetric: bool | None = None,
    ) -> QuantTypeInfo:
        """Return the type in which a tensor is made."""
        first = self._first(output_name) or {}
        return QuantTypeInfo(
            first.get("quant_type", default_qtype), first.get("symmetric", default_symmetric)
        )

    def get_node_input_qtype_info(
        self,
        input_name: str,
        node_name: str,
        default_qtype: QuantType | None,
        default_symmetric: bool | None = None,
        default_reduce_range: bool | None = None,
    ) -> QuantTypeInfo:
        """Return the type in which a node reads a tensor: the converted one if it receives that."""
        first = self._first(input_name) or {}
        convert = first.get("convert")
        if convert is None:
            return QuantTypeInfo.load_from_dict(
                first, default_qtype, default_symmetric, default_reduce_range
            )
        receivers = convert.get("recv_nodes")
        if receivers is not None and node_name not in receivers:
            return self.get_node_output_qtype_info(input_name, default_qtype, default_symmetric)
        return QuantTypeInfo(convert["quant_type"], convert.get("symmetric", default_symmetric))

    def pprint_str(self, indent: int | str | None = None) -> str:
        """Return the overrides as JSON, what JSON has no word for as text."""
        return json.dumps(self.overrides, default=str, indent=indent)

    def empty(self) -> bool:
        """Return whether nothing is said of any tensor."""
        return not self.overrides

    def get_dict(self) -> dict[str, list[Entry]]:
        """Return the dictionary itself."""
        return self.overrides

    def __setitem__(self, key: str, value: list[Entry]) -> None:
        self.overrides[key] = value

    def __getitem__(self, key: str) -> list[Entry]:
        return self.overrides[key]

    def __delitem__(self, key: str) -> None:
        del self.overrides[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.overrides)

    def __len__(self) -> int:
        return len(self.overrides)

    def __str__(self) -> str:
        return str(self.overrides)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.overrides})"


def named_types(overrides: Mapping[str, list[Entry]]) -> Iterator[QuantType]:
    """Return each type that entries name, or convert to."""
    for entries in overrides.values():
        for entry in entries:
            for said in (entry, entry.get("convert") or {}):
                if said.get("quant_type") is not None:
                    yield said["quant_type"]


def normalized_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy in which types are ``QuantType`` and ``recv_nodes`` sets.

    Types may come by name or from onnxruntime's enumeration. What has the wrong form stays as it
    is, for ``is_valid`` to say so.
    """
    return {
        name: [_normalized(entry) for entry in entries] if isinstance(entries, list) else entries
        for name, entries in (overrides or {}).items()
    }


def _normalized(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    own = dict(entry)
    name = getattr(own.get("quant_type"), "name", own.get("quant_type"))
    if isinstance(name, str) and name in QuantType.__members__:
        own["quant_type"] = QuantType[name]
    receivers = own.get("recv_nodes")
    if isinstance(receivers, Collection) and not isinstance(receivers, (str, bytes, Mapping)):
        own["recv_nodes"] = set(receivers)
    if "convert" in own:
        own["convert"] = _normalized(own["convert"])
        if own["convert"] is None:
            del own["convert"]
    return own
