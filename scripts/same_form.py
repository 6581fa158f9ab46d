"""Whether two quantized files have one form: nodes, names, connections, types; scales, codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as numpy_of

ROUNDING = 2e-5
"""Between two float32 evaluations of one network: sums in another order, largest seen 4e-6."""
HALF_ROUNDING = 4e-3  # four units in the last place of float16
_MIDDLES = (127, 128, -1, 0, 32767, 32768)  # of a symmetric range: half a code, a tie
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass
class Comparison:
    """What distinguishes two files.

    Attributes:
        form: nodes, names, types, shapes that differ, in words.
        values: scales, zero points and codes that differ by more than rounding, in words.
        scale: the largest relative difference between two scales.
    """

    form: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    scale: float = 0.0

    @property
    def same(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return not self.form and not self.values

    def __str__(self) -> str:
        found = [*self.form, *self.values]
        return "\n".join([*found[:12], *([f"... {len(found)} in all"] if len(found) > 12 else [])])


def compare(one: ModelProto, other: ModelProto, rounding: float = ROUNDING) -> Comparison:
    """Compare two files.

    Args:
        one: what is expected.
        other: what is there.
        rounding: relative, of float32 scales. Zero points may differ by one, and codes by what the
            scales differ by, where ``rounding`` of the type's range can move them over a tie.
    """
    found = Comparison()
    imports = [{o.domain or "ai.onnx": o.version for o in m.opset_import} for m in (one, other)]
    if imports[0] != imports[1]:
        found.form.append(f"opset imports: {imports[0]} / {imports[1]}")
    _compare_graphs(one.graph, other.graph, found, rounding)
    return found


def _compare_graphs(one: GraphProto, other: GraphProto, found: Comparison, rounding: float) -> None:
    for what in ("input", "output"):
        sides = [[(v.name, v.type) for v in getattr(graph, what)] for graph in (one, other)]
        if sides[0] != sides[1]:
            names = [[name for name, _ in side] for side in sides]
            found.form.append(f"graph {what}s: {names[0]} / {names[1]}")
    found.form.extend(f"in the first, {twice}" for twice in _repeated(one))
    found.form.extend(f"in the second, {twice}" for twice in _repeated(other))
    found.form.extend(_node_differences(one, other))
    tensors = [_constants(graph) for graph in (one, other)]
    for name in sorted({*tensors[0], *tensors[1]}):
        pair = [side.get(name) for side in tensors]
        if pair[0] is None or pair[1] is None:
            found.form.append(
                f"initializer {name}: only in the {'second' if pair[0] is None else 'first'}"
            )
        else:
            _compare_tensors(pair[0], pair[1], found, rounding)
    bodies = [dict(_bodies(graph)) for graph in (one, other)]
    for key in bodies[0].keys() & bodies[1].keys():
        _compare_graphs(bodies[0][key], bodies[1][key], found, rounding)


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Return initializers, and as such the tensors of Constant nodes."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def _repeated(graph: GraphProto) -> Iterator[str]:
    names = {
        "initializer": [tensor.name for tensor in graph.initializer],
        "value": [name for node in graph.node for name in node.output if name],
    }
    for what, all_names in names.items():
        yield from (f"{what} {n} {k} times" for n, k in Counter(all_names).items() if k > 1)


def _bodies(graph: GraphProto) -> Iterator[tuple[tuple[str, str], GraphProto]]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield (node.output[0], attribute.name), attribute.g


def _node_differences(one: GraphProto, other: GraphProto) -> Iterator[str]:
    sides = [
        {tuple(n.output): _describe(n) for n in graph.node if n.op_type != "Constant"}
        for graph in (one, other)
    ]
    for outputs in sides[0] | sides[1]:
        pair = [side.get(outputs) for side in sides]
        if pair[0] != pair[1]:
            yield f"node {list(outputs)}: {pair[0] or 'absent'} / {pair[1] or 'absent'}"


def _describe(node: NodeProto) -> str:
    attributes = sorted(
        f"{a.name}={helper.get_attribute_value(a)!r}"
        for a in node.attribute
        if a.type not in {AttributeProto.GRAPH, AttributeProto.TENSOR}
    )
    domain = node.domain if node.domain not in {"", "ai.onnx"} else ""
    return f"{domain}:{node.op_type} '{node.name}' {list(node.input)} {attributes}"


def _compare_tensors(
    one: TensorProto, other: TensorProto, found: Comparison, rounding: float
) -> None:
    kinds = [(TensorProto.DataType.Name(t.data_type), list(t.dims)) for t in (one, other)]
    if kinds[0] != kinds[1]:
        found.form.append(f"initializer {one.name}: {kinds[0]} / {kinds[1]}")
        return
    a, b = (numpy_of.to_array(t) for t in (one, other))
    if a.size == 0:
        return
    if one.data_type in FLOATS:
        _compare_floats(one.name, a, b, found, rounding)
    elif a.dtype.kind in "iu" or a.dtype.itemsize == 1:
        _compare_codes(one.name, a.astype(np.float64), b.astype(np.float64), found, rounding)
    elif not np.array_equal(a, b):
        found.values.append(f"{one.name}: {a.ravel()[:4]} / {b.ravel()[:4]}")


def _compare_floats(
    name: str, a: np.ndarray, b: np.ndarray, found: Comparison, rounding: float
) -> None:
    half = a.dtype == np.float16
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.maximum(np.abs(a), np.finfo(np.float32).tiny)
    difference = float(np.max(np.abs(a - b) / size))
    if "scale" in name:
        found.scale = max(found.scale, difference)
    if not difference <= (HALF_ROUNDING if half else rounding):
        worst = np.argmax(np.abs(a - b) / size)
        found.values.append(f"{name}: {a.ravel()[worst]:.8g} / {b.ravel()[worst]:.8g}")


def _compare_codes(
    name: str, a: np.ndarray, b: np.ndarray, found: Comparison, rounding: float
) -> None:
    # A code is round(x / scale): the scale's rounding moves it by that share of itself, and over a
    # tie. For 8 bits that is rare enough to be refused but in one of ten thousand codes.
    if name.endswith("zero_point") and np.all(np.isin((a, b), _MIDDLES)):
        return
    difference = np.abs(a - b)
    allowed = 1 + np.abs(a) * rounding
    share = float(np.mean(difference > 0))
    wide = float(np.max(np.abs(a))) * rounding > 0.01  # 16 bits and int32
    if np.any(difference > allowed) or (share > 1e-4 and not wide):
        worst = np.argmax(difference)
        found.values.append(
            f"{name}: {a.ravel()[worst]:g} / {b.ravel()[worst]:g}, {share:.2%} of codes"
        )
