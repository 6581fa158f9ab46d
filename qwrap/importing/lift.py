"""Operators on codes, as operators on reals between pairs: from QOperator files to QDQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants, label
from qwrap.graph.index import opset_of, walk_nodes
from qwrap.graph.nodes import STANDARD, domain_of
from qwrap.importing.chains import moved_outputs
from qwrap.importing.reading import UnreadableError, constant_of, integer, is_quantizer
from qwrap.model.attributes import attributes_of
from qwrap.ops.traits import PASS_THROUGH
from qwrap.quant.placement.forms import CONTRIB, DEQUANTIZE, QUANTIZE

PER_AXIS = 13  # first opset of ai.onnx whose pair has a scale per index of an axis
PER_TENSOR = 10  # and first with a pair at all
SOFTMAX_OF_ONE_AXIS = 13


@dataclass(frozen=True, slots=True)
class Form:
    """How an operator on codes is laid out.

    Attributes:
        op_type: what it computes on reals.
        operands: index of the codes of each operand; its scale and zero point follow.
        result: index of the scale of the output, its zero point follows.
        bias: index of a bias of int32, at the scale of both operands multiplied.
        plain: index of inputs that are no codes; they come first.
        axes: for each operand, the axis that several scales lie along.
    """

    op_type: str
    operands: tuple[int, ...]
    result: int
    bias: int | None = None
    plain: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


FORMS: Mapping[tuple[str, str], Form] = MappingProxyType({
    ("", "QLinearConv"): Form("Conv", (0, 3), 6, bias=8, axes=(1, 0)),
    ("", "QLinearMatMul"): Form("MatMul", (0, 3), 6, axes=(-2, -1)),
    (CONTRIB, "QGemm"): Form("Gemm", (0, 3), 7, bias=6, axes=(-2, -1)),
    (CONTRIB, "QLinearAdd"): Form("Add", (0, 3), 6),
    (CONTRIB, "QLinearMul"): Form("Mul", (0, 3), 6),
    (CONTRIB, "QLinearSigmoid"): Form("Sigmoid", (0,), 3),
    (CONTRIB, "QLinearLeakyRelu"): Form("LeakyRelu", (0,), 3),
    (CONTRIB, "QLinearSoftmax"): Form("Softmax", (0,), 3),
    (CONTRIB, "QLinearGlobalAveragePool"): Form("GlobalAveragePool", (0,), 3),
    (CONTRIB, "QLinearAveragePool"): Form("AveragePool", (0,), 3),
    (CONTRIB, "QLinearWhere"): Form("Where", (1, 4), 7, plain=(0,)),
})
DYNAMIC = {
    ("", "ConvInteger"): "the scales of its codes are computed while the model runs",
    ("", "MatMulInteger"): "the scales of its codes are computed while the model runs",
    ("", "DynamicQuantizeLinear"): "its scale is computed while the model runs",
}


def lift(model: ir.Model, notes: list[str]) -> ir.Model:
    """Return a copy in which reals travel where ``model`` computes with codes.

    QLinearConv and its kind become the operator on reals, with a DequantizeLinear on each operand
    and a QuantizeLinear on the result, whose output has the name that the codes had. onnxruntime
    fuses them as it does the pairs of its own tool. As written, products and sums are rounded once
    to float32 where the kernels rescale integers: codes next to a tie may move by one, and those
    of Softmax, whose kernel rounds one over the scale down, and of GlobalAveragePool, too.

    Args:
        model: not modified.
        notes: takes in a line for each operator on codes that stays, with the reason.
    """
    draft = model.clone()
    lifting = _Lifting(draft)
    for node in list(walk_nodes(draft.graph)):
        key = domain_of(node.domain), node.op_type
        form = FORMS.get(key)
        if key == (CONTRIB, "QLinearConcat"):
            form = Form("Concat", tuple(range(2, len(node.inputs), 3)), 0)
        if form is not None:
            reason = lifting.lift(node, form)
        else:
            reason = DYNAMIC.get(key, "")
            lifting.follow(node)
        if reason:
            notes.append(f"{label(node)} stays as it is: {reason}")
    return draft


class _Lifting:
    def __init__(self, draft: ir.Model) -> None:
        self.draft, self.opset = draft, opset_of(draft, "")
        self.constants = Constants(draft)
        self._names = {node.name for node in walk_nodes(draft.graph)}
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self._qparams: dict[ir.Value, list[ir.Value | None]] = {}

    def follow(self, node: ir.Node) -> None:
        """Take note of codes that a node makes, and let it move reals if it moves codes.

        onnxruntime makes all int8 uint8, but for what is not between pairs, and fuses no mixture.
        """
        codes = node.inputs[0] if node.inputs else None
        if is_quantizer(node, QUANTIZE):
            self._qparams[node.outputs[0]] = [*node.inputs[1:3]]
        known = PASS_THROUGH.get(node.op_type)
        if codes not in self._qparams or known is None or known.data != (0,):
            return
        if node.domain not in STANDARD or known.adds_zero or not known.holds(attributes_of(node)):
            return
        qparams = self._qparams[codes]
        if any((tensor := constant_of(v)) is None or tensor.size > 1 for v in qparams if v):
            return
        node.replace_input_with(0, self._dequantized(node, [codes, *qparams], None))
        for value in moved_outputs(node):
            self._quantize_behind(value, node, qparams)

    def _quantize_behind(
        self, value: ir.Value, node: ir.Node, qparams: list[ir.Value | None]
    ) -> None:
        """Let those that read ``value`` read codes of it, under its name, in place."""
        name = value.name or ""
        pair = self._node(QUANTIZE, [None, *qparams], None, name)
        _graph(node).insert_after(node, pair)
        self._take_over(value, pair.outputs[0])
        value.name, value.type = self._real_name(name), None
        pair.replace_input_with(0, value)
        self._qparams[pair.outputs[0]] = qparams

    def lift(self, node: ir.Node, form: Form) -> str:
        """Put a node on reals in the place of one on codes; return why it cannot be, if so."""
        try:
            attributes = self._attributes(node, form)
            inputs = self._reals(node, form)
        except UnreadableError as error:
            return str(error)
        graph = _graph(node)
        codes = node.outputs[0]
        made = ir.Node("", form.op_type, inputs, attributes, num_outputs=1, name=node.name)
        made.metadata_props.update(node.metadata_props)
        graph.insert_before(node, made)
        scale = _input(node, form.result)
        if scale is None:  # QGemm returns reals then
            self._take_over(codes, made.outputs[0])
        else:
            made.outputs[0].name = self._real_name(codes.name or "")
            zero = _input(node, form.result + 1) or self._zero(node, form)
            pair = self._node(QUANTIZE, [made.outputs[0], scale, zero], None, codes.name or "")
            graph.insert_before(node, pair)
            self._take_over(codes, pair.outputs[0])
            self._qparams[pair.outputs[0]] = [scale, zero]
        graph.remove(node, safe=True)
        return ""

    def _real_name(self, codes: str) -> str:
        stem = codes.removesuffix("_quantized")
        return self.constants.unique_name(stem if stem not in ("", codes) else f"{codes}_real")

    def _take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` be what ``old`` was, under its name, in place."""
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None

    # --- operands --------------------------------------------------------------------------------

    def _reals(self, node: ir.Node, form: Form) -> list[ir.Value | None]:
        """Return what the node on reals reads; nothing is inserted if one of them cannot be."""
        wanted = []
        for number, index in enumerate(form.operands):
            axis = form.axes[number] if form.axes else None
            wanted.append((index, self._axis(node, form, index, axis)))
        for index in (form.result, form.result + 1):
            self._require_constant(node, index)
        bias = _input(node, form.bias) if form.bias is not None else None
        scale = None if bias is None else self._bias_scale(node, form, bias)
        inputs = [node.inputs[index] for index in form.plain]
        for index, axis in wanted:
            parts = [_input(node, index + i) for i in range(3)]
            inputs.append(self._dequantized(node, parts, axis))
        if bias is not None and scale is not None:
            axis = 0 if len(scale) > 1 else None
            stored = scale if len(scale) > 1 else scale.reshape(())
            name = self.constants.unique_name(f"{bias.name}_scale")
            value = self.constants.add(self.draft.graph, name, stored)
            inputs.append(self._dequantized(node, [bias, value, None], axis))
        return inputs

    def _axis(self, node: ir.Node, form: Form, index: int, axis: int | None) -> int | None:
        """Return the axis that the scales of an operand lie along, None for one scale."""
        scale = self._require_constant(node, index + 1)
        self._require_constant(node, index + 2)
        if scale is None or scale.size == 1:
            return None
        if axis is None or len(scale.shape) != 1:
            raise UnreadableError(f"its scale has shape {list(scale.shape.numpy())}")
        if form.op_type == "Gemm" and integer(node, "transB", 0) and axis == -1:
            return 0
        value = node.inputs[index]
        tensor = constant_of(value)
        return axis if tensor is None else axis % len(tensor.shape)

    def _require_constant(self, node: ir.Node, index: int) -> ir.TensorProtocol | None:
        value = _input(node, index)
        tensor = constant_of(value)
        if value is not None and tensor is None:
            raise UnreadableError("a scale or zero point of it is computed while the model runs")
        return tensor

    def _bias_scale(
        self, node: ir.Node, form: Form, bias: ir.Value
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        if constant_of(bias) is None:
            raise UnreadableError("its bias is computed while the model runs")
        x, weight = (self._require_constant(node, index + 1) for index in form.operands)
        assert x is not None
        assert weight is not None
        product = x.numpy().reshape(-1) * weight.numpy().reshape(-1)
        return np.asarray(product, np.float32)

    def _dequantized(
        self, node: ir.Node, parts: Iterable[ir.Value | None], axis: int | None
    ) -> ir.Value:
        """Return the reals that codes stand for, the same for all that read them in one graph."""
        codes, *more = parts
        assert codes is not None
        key = (codes, *more, axis, node.graph)
        if key not in self._made:
            made = self._node(DEQUANTIZE, [codes, *more], axis, codes.name or "codes")
            _graph(node).insert_before(node, made)
            made.outputs[0].name = self.constants.unique_name(f"{codes.name}_{DEQUANTIZE}_Output")
            self._made[key] = made.outputs[0]
        return self._made[key]

    def _zero(self, node: ir.Node, form: Form) -> ir.Value | None:
        """Return the zero point of an output whose node leaves it out: codes are as those read."""
        given = _input(node, form.operands[0] + 2)
        tensor = constant_of(given)
        if tensor is None or tensor.dtype == ir.DataType.UINT8:
            return None
        name = self.constants.unique_name(f"{node.outputs[0].name}_zero_point")
        return self.constants.add(self.draft.graph, name, np.zeros((), tensor.numpy().dtype))

    def _node(
        self, op_type: str, inputs: list[ir.Value | None], axis: int | None, tensor: str
    ) -> ir.Node:
        needed = PER_TENSOR if axis is None else PER_AXIS
        domain = "" if self.opset >= needed else CONTRIB
        if domain:
            self.draft.graph.opset_imports.setdefault(CONTRIB, 1)
        name, count = f"{tensor}_{op_type}", 0
        while name in self._names:
            count += 1
            name = f"{tensor}_{op_type}_{count}"
        self._names.add(name)
        while inputs[-1] is None:
            inputs = inputs[:-1]
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        return ir.Node(domain, op_type, inputs, attributes, num_outputs=1, name=name)

    # --- attributes ------------------------------------------------------------------------------

    def _attributes(self, node: ir.Node, form: Form) -> list[ir.Attr]:
        """Return what the node on reals is told.

        Raises:
            UnreadableError: it lays data out as no operator of ONNX does.
        """
        if integer(node, "channels_last", 0):
            raise UnreadableError("its channels come last, as in no operator of ONNX")
        own = dict(node.attributes)
        own.pop("channels_last", None)
        own.pop("opset", None)
        if form.op_type == "Softmax":
            self._check_softmax(node)
            own.setdefault("axis", ir.AttrInt64("axis", -1))
        if form.op_type == "Gemm" and "alpha" in own:  # it multiplies the bias too
            own["beta"] = ir.AttrFloat32("beta", own["alpha"].as_float())
        return [*own.values()]

    def _check_softmax(self, node: ir.Node) -> None:
        """Refuse a Softmax over several axes where the model's is over one, and the reverse.

        Raises:
            UnreadableError: unless it is over the last axis, for which both are the same.
        """
        flattens = integer(node, "opset", self.opset) < SOFTMAX_OF_ONE_AXIS
        axis = integer(node, "axis", -1)
        value = node.inputs[0]
        shape = None if value is None else value.shape
        is_last = axis == -1 or (shape is not None and axis == len(shape) - 1)
        if flattens != (self.opset < SOFTMAX_OF_ONE_AXIS) and not is_last:
            raise UnreadableError("its axes are those of a Softmax of another opset")


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
