"""What onnxruntime has to say of a quantized file, on CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from qwrap.errors import ExportError, QwrapWarning
from qwrap.quant.placement.forms import QUANTIZE, Format

STACK = 9  # from here to who called ``export``
SILENT = 4  # log severity; what goes wrong arrives as an exception
NO_FUSION = "session.disable_quant_qdq"

Written = tuple[Format, str, str]  # format, operator, domain


def check_session(
    path: Path,
    written: Iterable[Written],
    opset: int,
    float_model: Callable[[], ir.Model],
    folder: Path,
) -> None:
    """Open a session on a quantized file, as users do.

    Warns where it is not the file that is at fault: onnxruntime lacks kernels for a format, can
    run the float model no more than the quantized one, or its optimiser builds integer kernels
    for types that these do not take.

    Args:
        path: the file.
        written: the quantizers that are in it.
        opset: of ai.onnx that it imports.
        float_model: returns the model without quantizers.
        folder: where that has its external data, if any.

    Raises:
        ExportError: onnxruntime refuses the file, although it runs the float model.
    """
    lacking = [w for w in written if not has_kernel(*w, opset)]
    if lacking:
        names = sorted({f"{op_type} of {form}" for form, op_type, _ in lacking})
        _warn(f"has no kernel for {'; '.join(names)}: the file was written, but not tried")
        return
    refusal = _refusal(path)
    if refusal is None:
        return
    if _refusal(path, {NO_FUSION: "1"}) is None:
        _warn(
            f"opens the file only with the session option {NO_FUSION}=1, because without it its "
            f"optimiser makes integer kernels for types that they do not take ({refusal})"
        )
        return
    without = _refusal_of(float_model(), folder)
    if without is None:
        raise ExportError(f"onnxruntime refuses the quantized model: {refusal}")
    _warn(f"cannot run the float model either ({without}): the file was written, but not tried")


def _warn(text: str) -> None:
    warnings.warn(f"onnxruntime {ort.__version__} on CPU {text}", QwrapWarning, stacklevel=STACK)


def _refusal(model: Path | bytes, options: dict[str, str] | None = None) -> str | None:
    """Return why no session opens, None if one does."""
    settings = ort.SessionOptions()
    settings.log_severity_level = SILENT
    for name, value in (options or {}).items():
        settings.add_session_config_entry(name, value)
    try:
        ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        return str(error)
    return None


def _refusal_of(model: ir.Model, folder: Path) -> str | None:
    options = {"session.model_external_initializers_file_folder_path": str(folder)}
    try:
        return _refusal(ir.to_proto(model).SerializeToString(), options)
    except ValueError:  # too large for one message: it is not known to fail
        return None


@cache
def has_kernel(form: Format, op_type: str, domain: str, opset: int) -> bool:
    """Whether onnxruntime on CPU runs ``op_type`` of ``domain`` on ``form``: it is asked."""
    return _refusal(one_node(form, op_type, domain, opset).SerializeToString()) is None


def one_node(form: Format, op_type: str, domain: str, opset: int) -> onnx.ModelProto:
    """Return a model of one quantizer, on inputs ``x`` of rank 2, ``scale`` and ``zero_point``."""
    attributes: dict[str, Any] = {} if form.granularity == "tensor" else {"axis": 1}
    if form.granularity == "block":
        attributes["block_size"] = 2
    if op_type == QUANTIZE:
        given, result = form.real, form.codes
        if form.scale != ir.DataType.FLOAT and opset >= 23:
            attributes["precision"] = ir.DataType.FLOAT
    else:
        given, result = form.codes, form.real
        if form.scale != form.real:
            attributes["output_dtype"] = form.real
    shapes = {"tensor": [], "axis": ["C"], "block": ["N", "B"]}
    shape = shapes[form.granularity]
    info = helper.make_tensor_value_info
    node = helper.make_node(
        op_type, ["x", "scale", "zero_point"], ["y"], domain=domain, **attributes
    )
    graph = helper.make_graph(
        [node],
        op_type,
        [
            info("x", given, ["N", "C"]),
            info("scale", form.scale, shape),
            info("zero_point", form.codes, shape),
        ],
        [info("y", result, ["N", "C"])],
    )
    imports = [helper.make_opsetid("", opset)]
    if domain:
        imports.append(helper.make_opsetid(domain, 1))
    version = helper.find_min_ir_version_for(imports[:1], ignore_unknown=True)
    return helper.make_model(graph, opset_imports=imports, ir_version=version)
