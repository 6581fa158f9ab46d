"""Types that the user writes as an ONNX function: run in torch, and checked before use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qwrap.config import QConfig
from qwrap.dtypes import QuantFunction, QuantType, is_free_name
from qwrap.errors import ConfigError, ExportError, QwrapError
from qwrap.graph.nodes import STANDARD
from qwrap.graph.opset import raise_opset
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.placement.forms import FUNCTION_OPSET

Gradient = Literal["straight-through", "own"]
TOLERANCE = 1e-4  # steps; for the rounding of float32 products


class HasFunctionProto(Protocol):
    """Something that is written as an ONNX function, such as those of onnxscript."""

    def to_function_proto(self) -> onnx.FunctionProto:
        """Return the function."""
        ...


def function_type(
    function: onnx.FunctionProto | HasFunctionProto,
    qmin: float,
    qmax: float,
    *,
    name: str | None = None,
    gradient: Gradient = "straight-through",
) -> QuantType:
    """Return a type whose values are what an ONNX function makes of them.

    The function is written once: qwrap runs it to simulate, and writes it into the models that it
    exports. It takes ``x``, ``scale`` and perhaps ``zero_point``, all float32, and returns float32
    of the shape of ``x``: what ``x`` is after quantization and dequantization. Scale and zero point
    are scalars, or tensors that broadcast against ``x``. Weights of such a type are exported as the
    floats they are, with a call of the function behind them: a file does not become smaller.

    Args:
        function: of one output; an onnxscript function will do. It must stand alone: it has no
            attributes without default, and calls no other functions of its model.
        qmin: smallest number it returns, in units of the scale, with the zero point added. The
            scale is chosen so that it stands for the lower end of the range.
        qmax: largest number, likewise.
        name: what the type is called in plans and files; by default the function's name.
        gradient: ``"straight-through"`` passes the gradient of ``x`` where
            ``x / scale + zero_point`` lies between ``qmin`` and ``qmax``; ``"own"`` propagates it
            through the operators of the function.

    Raises:
        ConfigError: onnxruntime or qwrap cannot run the function, or it is no quantization: on
            sample values, another shape, values outside ``qmin`` to ``qmax`` or not finite, 0 that
            does not stay 0, a second application that changes the values, or another result for
            the same values. The message says what was found.
    """
    proto = function if isinstance(function, onnx.FunctionProto) else _proto_of(function)
    name = proto.name if name is None else name
    if not is_free_name(name):
        raise ConfigError(f"a type cannot be called {name!r}: give a new identifier as name")
    if gradient not in get_args(Gradient):
        raise ConfigError(f"gradient={gradient!r}: choose one of {get_args(Gradient)}")
    if not qmin < qmax or not qmin <= 0 <= qmax:
        raise ConfigError(f"type {name!r}: qmin={qmin} and qmax={qmax} have to enclose 0")
    _check_signature(proto, name)
    _check_in_onnxruntime(proto)
    quant_function = QuantFunction(
        proto=proto.SerializeToString(deterministic=True),
        compute=_Computation(proto),
        has_zero_point=len(proto.input) == 3,
        own_gradient=gradient == "own",
    )
    made = QuantType(
        name=name,
        onnx_type=TensorProto.FLOAT,
        torch_dtype=torch.float32,
        bits=32,
        qmin=qmin,
        qmax=qmax,
        opset=_opset(proto),
        function=quant_function,
    )
    _probe(made, quant_function)
    return made


def _proto_of(function: HasFunctionProto) -> onnx.FunctionProto:
    if not hasattr(function, "to_function_proto"):
        raise ConfigError(f"expected an onnx.FunctionProto, got {type(function).__name__}")
    return function.to_function_proto()


def _check_signature(proto: onnx.FunctionProto, name: str) -> None:
    inputs, outputs = list(proto.input), list(proto.output)
    if len(inputs) not in (2, 3) or len(outputs) != 1:
        raise ConfigError(
            f"type {name!r}: expected a function (x, scale[, zero_point]) -> y; got {inputs} -> "
            f"{outputs}"
        )
    if proto.attribute:
        raise ConfigError(
            f"type {name!r}: give attributes {list(proto.attribute)} default values, as nothing "
            "else says what they are"
        )
    if not proto.domain or proto.domain in STANDARD:
        raise ConfigError(f"type {name!r}: give the function a domain of its own")


def _check_in_onnxruntime(proto: onnx.FunctionProto) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = _model_of(proto).SerializeToString()
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(f"onnxruntime refuses function {proto.name!r}: {error}") from error


def _opset(proto: onnx.FunctionProto, otherwise: int = 1) -> int:
    """Return the opset of ai.onnx that the function was written for."""
    return next((o.version for o in proto.opset_import if o.domain in STANDARD), otherwise)


class _Computation:
    """A function as a callable on tensors: ``(x, *qparams) -> y``; it never changes."""

    def __init__(self, proto: onnx.FunctionProto) -> None:
        self.proto = proto
        try:
            self.model = load(_model_of(proto), parameters=[])
        except QwrapError as error:
            raise ConfigError(f"function {proto.name!r} cannot be run: {error}") from error
        self.copies: dict[torch.device, WrappedModel] = {torch.device("cpu"): self.model}

    def __call__(self, x: Tensor, *qparams: Tensor) -> Tensor:
        """Return what the function makes of ``x``, on its device."""
        model = self.copies.get(x.device)
        if model is None:
            model = self.copies[x.device] = copy.deepcopy(self.model).to(x.device)
        result: Tensor = model(x, *qparams)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Computation:
        return self

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _computation, (self.proto.SerializeToString(),)


def _computation(proto: bytes) -> _Computation:
    return _Computation(onnx.FunctionProto.FromString(proto))


def _model_of(proto: onnx.FunctionProto) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in proto.input]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    call = helper.make_node(proto.name, list(proto.input), ["y"], domain=proto.domain)
    call.overload = proto.overload
    imports = [*proto.opset_import, helper.make_opsetid(proto.domain, 1)]
    unique = {o.domain: o for o in imports}
    if "" not in unique and "ai.onnx" not in unique:
        unique[""] = helper.make_opsetid("", 1)
    return helper.make_model(
        helper.make_graph([call], proto.name, inputs, [output]),
        functions=[proto],
        opset_imports=list(unique.values()),
        ir_version=10,
    )


# --- in a model ----------------------------------------------------------------------------------


def check_functions(config: QConfig, opset: int) -> None:
    """Refuse types of ``config`` whose functions cannot be written into a model of ``opset``.

    Raises:
        ConfigError: with the reason.
    """
    for spec in (*config.activation_specs, *config.weight_specs(None, 0)):
        function = spec.dtype.function
        if function is not None:
            try:
                at_opset(onnx.FunctionProto.FromString(function.proto), opset)
            except ExportError as error:
                raise ConfigError(f"type {spec.dtype}: {error}") from error


def at_opset(proto: onnx.FunctionProto, opset: int) -> ir.Function:
    """Return a function with its nodes as of ai.onnx ``opset``.

    Raises:
        ExportError: it was written for a later opset, or some of its nodes have no equal there.
    """
    before = _opset(proto, opset)
    if before > opset or (before < opset < FUNCTION_OPSET):
        raise ExportError(
            f"function {proto.name!r} is written for opset {before}, but the graph imports opset "
            f"{opset}; write it for that one"
        )
    graph = helper.make_graph([], "function", [], [])
    imports = [helper.make_opsetid("", before)]
    holder = ir.from_proto(helper.make_model(graph, functions=[proto], opset_imports=imports))
    if before < opset:
        raise_opset(holder, opset)
    (function,) = holder.functions.values()
    return function


# --- whether it is a quantization ----------------------------------------------------------------


def _probe(dtype: QuantType, function: QuantFunction) -> None:
    """Run the function on sample values, and refuse what no scheme would make of them."""
    for x, scale, zero_point in _samples(dtype):
        inputs = (scale, zero_point) if function.has_zero_point else (scale,)
        try:
            with torch.no_grad():
                y, again = (function.compute(x, *inputs) for _ in range(2))
                twice = function.compute(y, *inputs)
        except (RuntimeError, IndexError, ValueError, QwrapError) as error:
            raise ConfigError(
                f"type {dtype}: its function fails on x {list(x.shape)} with a scale of shape "
                f"{list(scale.shape)}: {error}"
            ) from error
        if problem := _problem(dtype, x, y, again, twice, scale, zero_point):
            raise ConfigError(f"type {dtype}: its function is no quantization: {problem}")
    if function.own_gradient:
        _check_gradient(dtype, function)


def _samples(dtype: QuantType) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield x, scale and zero point: one scale for all, then one for each channel."""
    ramp = torch.linspace(1.5 * dtype.qmin - 1, 1.5 * dtype.qmax + 1, 240)
    ramp[::60] = 0.0
    zeros = {max(dtype.qmin, 0.0), round((dtype.qmin + dtype.qmax) / 2)}
    scales = torch.tensor([0.037, 1.0, 3.3])
    for number in sorted(zeros) if dtype.has_zero_point else [0.0]:
        zero_point = torch.tensor(float(number))
        for scale in scales:
            yield ramp * scale, scale, zero_point
        for shape, x in (((1, 3, 1), ramp.reshape(8, 3, 10)), ((3, 1, 1), ramp.reshape(3, 8, 10))):
            by_channel = scales.reshape(shape)
            yield x * by_channel, by_channel, zero_point.expand(shape)


def _problem(
    dtype: QuantType,
    x: Tensor,
    y: Tensor,
    again: Tensor,
    twice: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> str | None:
    """Return what is wrong with the function's result ``y``, None if nothing is."""
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return f"x of {x.dtype} {list(x.shape)} became {y.dtype} {list(y.shape)}"
    if not y.isfinite().all():
        worst = x[~y.isfinite()][0]
        return f"x={worst:g} became {y[~y.isfinite()][0]:g}"
    if not torch.equal(y, again):
        return "the same values gave another result the second time"
    if (zeros := y[x == 0]).count_nonzero():
        return f"0 became {zeros[zeros != 0][0]:g} with scale {scale.max():g}; it has to stay 0"
    steps = y / scale + zero_point
    tolerance = TOLERANCE * max(1.0, abs(dtype.qmin), abs(dtype.qmax))
    if steps.min() < dtype.qmin - tolerance or steps.max() > dtype.qmax + tolerance:
        return (
            f"its values reach from {steps.min():g} to {steps.max():g} steps of the scale, beyond "
            f"qmin={dtype.qmin:g} and qmax={dtype.qmax:g}"
        )
    moved = ((twice - y) / scale).abs()
    if moved.max() > tolerance:
        at = moved.argmax()
        return (
            f"{y.flatten()[at]:g}, a value that it returned, became {twice.flatten()[at]:g} when "
            "it was applied again"
        )
    return None


def _check_gradient(dtype: QuantType, function: QuantFunction) -> None:
    """Refuse a function whose own gradient does not exist, or is not finite."""
    for x, scale, zero_point in _samples(dtype):
        x.requires_grad_()
        inputs = (scale, zero_point) if function.has_zero_point else (scale,)
        y = function.compute(x, *inputs)
        if not y.requires_grad:
            raise ConfigError(
                f"type {dtype}: gradients do not pass its function; use gradient='straight-through'"
            )
        (gradient,) = torch.autograd.grad(y.sum(), x)
        if not gradient.isfinite().all():
            raise ConfigError(f"type {dtype}: the gradient of its function is not finite")
        if not gradient.any():
            raise ConfigError(
                f"type {dtype}: the gradient of its function is 0 everywhere, as that of Round "
                "is; use gradient='straight-through'"
            )
