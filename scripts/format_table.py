"""Ask ONNX which opset carries each number format, and onnxruntime what it does with it.

python scripts/format_table.py                  # print the tables
python scripts/format_table.py --update-readme  # and put them into the README

Opsets come from ONNX's schemas. What runs, and what becomes an integer kernel, comes from sessions
that are opened on small models here and now.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from readme_section import update_section

import qwrap
from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import FLOATS, INTEGERS, QuantType
from qwrap.errors import QwrapWarning
from qwrap.export.runtime import has_kernel
from qwrap.quant.placement.forms import (
    CONTRIB,
    DEQUANTIZE,
    QUANTIZE,
    Format,
    Granularity,
    carried_by_contrib,
    lowest_opset,
)

README = Path(__file__).resolve().parents[1] / "README.md"
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "axis", "block")
REALS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
YES, NO = "yes", "-"
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One format.

    Attributes:
        opsets: lowest opset by granularity.
        contrib: granularities that com.microsoft's pair carries.
        runs: type of the tensor -> whether onnxruntime has both kernels.
        activation: what becomes of a Conv between pairs of the type, with int8 weights.
        weight: what becomes of a MatMul with weights of the type, between uint8 pairs and alone.
    """

    dtype: QuantType
    opsets: dict[Granularity, int]
    contrib: list[Granularity]
    runs: dict[ir.DataType, bool]
    activation: str
    weight: str
    alone: str


def rows() -> Iterator[Row]:
    """Yield a row for every type."""
    for dtype in (*INTEGERS, *FLOATS):
        codes = ir.DataType(dtype.onnx_type)
        forms = {g: Format(codes=codes, granularity=g) for g in GRANULARITIES}
        blocked = QuantSpec(dtype=dtype, block_size=BLOCK)
        yield Row(
            dtype,
            opsets={g: _lowest(form) for g, form in forms.items()},
            contrib=[g for g, form in forms.items() if carried_by_contrib(form)],
            runs={real: _runs(Format(codes=codes, real=real, scale=real)) for real in REALS},
            activation=kernel_of("Conv", QConfig(activation=dtype)),
            weight=kernel_of("MatMul", QConfig(weight=dtype)),
            alone=kernel_of("MatMul", QConfig(activation=None, weight=blocked)),
        )


def _lowest(form: Format) -> int:
    opsets = [lowest_opset(form, op_type) for op_type in (QUANTIZE, DEQUANTIZE)]
    return max(opset for opset in opsets if opset is not None)


def _runs(form: Format) -> bool:
    opset = _lowest(form)
    return all(has_kernel(form, op_type, "", opset) for op_type in (QUANTIZE, DEQUANTIZE))


def kernel_of(op_type: str, config: QConfig) -> str:
    """Return what onnxruntime makes of one operator of a model that was quantized so."""
    config.scope, config.method, config.weight_method = "kernels", "minmax", "minmax"
    shape = (1, 32, 8, 8) if op_type == "Conv" else (4, 32)
    weight = (32, 32, 1, 1) if op_type == "Conv" else (32, 32)
    model = qwrap.load(_one_operator(op_type, shape, weight)).eval()
    qwrap.prepare(model, config)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    qwrap.calibrate(model, [x], progress=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", QwrapWarning)  # what it says is found out below
        path = Path(folder) / "q.onnx"
        qwrap.export(model, path)
        return _operators(path, x)


def _one_operator(op_type: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    values = np.random.default_rng(1).normal(size=weight).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"], op_type)],
        op_type,
        [info("x", TensorProto.FLOAT, shape)],
        [info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _operators(path: Path, x: np.ndarray) -> str:
    """Return what runs in the optimised file; or that onnxruntime refuses it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    optimised = path.with_suffix(".optimised.onnx")
    options.optimized_model_filepath = str(optimised)
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        session.run(None, {"x": x})
    except Exception:  # onnxruntime's exceptions share no base class
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception:
            return "no kernel"
        return "float, unfused only"
    fillers = {QUANTIZE, DEQUANTIZE, "ReorderInput", "ReorderOutput", "Transpose", "Max"}
    found = [n.op_type for n in onnx.load(optimised).graph.node if n.op_type not in fillers]
    return ", ".join("float" if op in ("Conv", "MatMul") else op for op in found)


def table(found: list[Row]) -> str:
    """Return the rows in Markdown."""
    heads = ["type", "opset", "per axis", "blocks", CONTRIB, "float32", "float16", "bfloat16"]
    heads += ["Conv between pairs", "MatMul, such weights, uint8 pairs", "weights alone, blocks"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in found:
        cells = [str(row.dtype), *(str(row.opsets[g]) for g in GRANULARITIES)]
        cells.append("tensor, axis" if row.contrib else NO)
        cells += [YES if row.runs[real] else NO for real in REALS]
        cells += [row.activation, row.weight, row.alone]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scales() -> str:
    """Return the table of what scales are stored as, beside float32 tensors."""
    heads = ["scales of", "opset", "per axis", "blocks", "onnxruntime runs it"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    types = {
        "float32": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
        "float8e8m0 (MX)": ir.DataType.FLOAT8E8M0,
    }
    for name, kind in types.items():
        forms = [
            Format(codes=ir.DataType.INT8, scale=kind, granularity=granularity)
            for granularity in GRANULARITIES
        ]
        opsets = [str(_lowest(form)) for form in forms]
        lines.append(f"| {name} | {' | '.join(opsets)} | {YES if _runs(forms[0]) else NO} |")
    inner = Format(codes=ir.DataType.FLOAT8E4M3FN)
    opset = lowest_opset(inner, DEQUANTIZE)
    assert opset is not None
    runs = YES if has_kernel(inner, DEQUANTIZE, "", opset) else NO
    cells = ["float8e4m3fn times one float32 (NV)", NO, NO, "21", runs]
    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or write them to the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update-readme", action="store_true", help="put the tables there")
    options = parser.parse_args()
    made = f"Measured with onnxruntime {onnxruntime.__version__} on CPU."
    text = "\n\n".join([made, table(list(rows())), scales()])
    if options.update_readme:
        update_section(README, "formats", text)
    print(text)


if __name__ == "__main__":
    main()
