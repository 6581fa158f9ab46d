"""Every form of models as they are found: float16, any opset and size, shared weights.

What is written loads in onnxruntime with all its optimizations, and is near the float model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from one_operator import (
    NEWEST,
    Batch,
    Case,
    Made,
    make,
    make_batches,
    make_model,
    open_session,
    run,
    sqnr,
)
from onnx import ModelProto
from operator_cases import CASES, LAYERS
from ort_script import OWN, Setting, quantize

TOKENS = {"x": (-1, -1, 16)}
ATTENTION = CASES["attention_of_MatMuls"]
BLOCK = Case(ATTENTION.nodes, TOKENS, ATTENTION.outputs, ATTENTION.weights)
TIED = Case(
    "h = Gather(table, ids) m = MatMul(h, w) r = Relu(m) y = MatMul(r, turned)",
    {"ids": (-1, -1)},
    {"y": 3},
    {"table": (32, 16), "w": (16, 16)},
    integers={"ids": 32},
)
TIED_GEMM = Case(
    "h = Gather(table, ids) f = Reshape(h, flat) y = Gemm<transB=1>(f, table)",
    {"ids": (-1, -1)},
    {"y": 2},
    {"table": (32, 16), "flat": np.array([-1, 16])},
    integers={"ids": 32},
)
TWICE = Case(
    "p = MatMul(x, w) q = Relu(p) r = MatMul(q, w) y = Add(r, x)", TOKENS, {"y": 3}, {"w": (16, 16)}
)


def weight_only(made: Made, folder: Path, qdq: bool = False, bits: int = 4) -> ModelProto:
    from qwrap.ort import QuantFormat
    from qwrap.ort.matmul_nbits_quantizer import MatMulNBitsQuantizer

    form = QuantFormat.QDQ if qdq else QuantFormat.QOperator
    quantizer = MatMulNBitsQuantizer(
        made.model, bits=bits, block_size=16, is_symmetric=False, quant_format=form
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "nbits.onnx"))
    return onnx.load(folder / "nbits.onnx")


def by_script(setting: Setting) -> Callable[[Made, Path], ModelProto]:
    def quantized(made: Made, folder: Path) -> ModelProto:
        onnx.save(made.model, folder / "float.onnx")
        return quantize(OWN, folder / "float.onnx", made.batches, folder / "out.onnx", setting)

    return quantized


# A form, and the SQNR in dB below which something is wrong: 8 bits and 4 bits of normal values.
FORMS: dict[str, tuple[Callable[[Made, Path], ModelProto], float]] = {
    "QDQ": (by_script(Setting()), 24),
    "QDQ per channel": (by_script(Setting(per_channel=True)), 24),
    "QOperator": (by_script(Setting(form="QOperator")), 24),
    "dynamic": (by_script(Setting(form="dynamic", weight="QUInt8")), 24),
    "weights": (weight_only, 10),
    "weights in pairs": (lambda made, folder: weight_only(made, folder, qdq=True), 10),
}
each_form = pytest.mark.parametrize("form", FORMS)


def check(made: Made, folder: Path, form: str, batches: list[Batch] | None = None) -> ModelProto:
    make_form, least = FORMS[form]
    quantized = make_form(made, folder)
    for batch in batches or made.batches:
        wanted = run(made.model, batch)
        for optimised in (False, True):
            assert sqnr(wanted, run(quantized, batch, optimised)) > least
    return quantized


@pytest.mark.ort(49)
@each_form
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_float16_models(tmp_path: Path, form: str, opset: int) -> None:
    names = ["MatMul_tokens"] if form.startswith("weights") else ["MatMul_tokens", "Conv_to_head"]
    for name in names:
        quantized = check(make(CASES[name], opset, half=True), tmp_path, form)
        kinds = {i.type.tensor_type.elem_type for i in quantized.graph.input}
        assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.ort(263)
@each_form
@pytest.mark.parametrize("opset", range(10, NEWEST + 1))
def test_opsets(tmp_path: Path, form: str, opset: int) -> None:
    name = "MatMul_tokens" if form.startswith("weights") else "Conv_to_head"
    check(make(CASES[name], opset), tmp_path, form)


@pytest.mark.ort(263)
@pytest.mark.parametrize("opset", [27, 28])
@pytest.mark.parametrize("form", ["QDQ", "dynamic"])
def test_opsets_newer_than_onnxruntime(tmp_path: Path, form: str, opset: int) -> None:
    """onnxruntime 1.31 opens opset 26 at most; the checker knows the others."""
    made = make(LAYERS["MatMul"], opset)
    quantized = FORMS[form][0](made, tmp_path)
    onnx.checker.check_model(quantized)
    assert {o.domain: o.version for o in quantized.opset_import}[""] == opset


@pytest.mark.ort(319, "G33")
@each_form
def test_batch_and_length_stay_open(tmp_path: Path, form: str) -> None:
    """Calibrated on some lengths, run on others."""
    sizes = [(1, 3), (2, 7), (3, 5)]
    batches = [
        make_batches(Case("", {"x": (*size, 16)}, {}), 1, seed=seed)[0]
        for seed, size in enumerate(sizes)
    ]
    others = [make_batches(Case("", {"x": (4, 6, 16)}, {}), 1, seed=2)[0]]
    made = Made(make_model(BLOCK), batches)
    quantized = check(made, tmp_path, form, [*batches, *others])
    shapes = [i.shape for i in open_session(quantized).get_inputs()]
    assert not any(isinstance(size, int) for size in shapes[0][:2])


@pytest.mark.ort("G11")
@each_form
def test_weights_in_constant_nodes(tmp_path: Path, form: str) -> None:
    quantized = check(make(BLOCK, constants=True), tmp_path, form)
    floats = [t for t in quantized.graph.initializer if t.data_type == 1 and np.prod(t.dims) >= 256]
    kept = [n for n in quantized.graph.node if n.op_type == "Constant"]
    assert not floats
    assert not kept


@pytest.mark.ort("G3", "G47")
@each_form
@pytest.mark.parametrize("name", ["table", "table of a Gemm", "twice"])
def test_tied_weights(tmp_path: Path, form: str, name: str) -> None:
    if name == "table":
        model = make_model(TIED)
        table = onnx.numpy_helper.to_array(model.graph.initializer[0])
        turned = onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), "turned")
        model.graph.initializer.append(turned)
        made = Made(model, make_batches(TIED))
    else:
        made = make({"table of a Gemm": TIED_GEMM, "twice": TWICE}[name])
    quantized = check(made, tmp_path, form)
    names = [t.name for t in quantized.graph.initializer]
    assert len(names) == len(set(names))
    if name == "twice" and form != "weights in pairs":
        assert sum(name.startswith("w_") and "scale" in name for name in names) == 1
