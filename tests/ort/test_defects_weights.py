"""Weight-only quantization: settings that onnxruntime's tool ignores, files that do not load."""

from __future__ import annotations

import importlib
import logging
import time
from typing import Any

import numpy as np
import onnx
import pytest
from one_operator import Batch, Case, attributes_of, make_model, node_of, open_session, run, sqnr
from onnx import ModelProto
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph
from ort_script import INCUMBENT, OWN, Reader, quiet

INVALID = (Fail, InvalidArgument, InvalidGraph)
WIDE = {"x": (-1, 128)}
CHAIN = Case("h = MatMul(x, w) y = MatMul(h, v)", WIDE, {"y": 2}, {"w": (128, 64), "v": (64, 32)})
ONE = Case("y = MatMul(x, w)", WIDE, {"y": 2}, {"w": (128, 64)})


def nbits(module: str) -> Any:
    return importlib.import_module(f"{module}.matmul_nbits_quantizer")


def quantized(module: str, model: ModelProto, **settings: Any) -> ModelProto:
    """Run the quantizer on a copy; settings that are functions get the submodule."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tool = nbits(module)
    ready = {key: value(tool) if callable(value) else value for key, value in settings.items()}
    with quiet(module):
        quantizer = tool.MatMulNBitsQuantizer(copy, **ready)
        quantizer.process()
    result: ModelProto = quantizer.model.model
    return result


def types_of(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def correlated(count: int, seed: int) -> list[Batch]:
    """Rows whose columns follow each other, as activations do."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(0, 1, (16, 128))
    noise = rng.normal(0, 0.1, (count, 64, 128))
    rows = rng.normal(0, 1, (count, 64, 16)) @ mixing + noise
    return [{"x": batch.astype(np.float32)} for batch in rows]


@pytest.mark.ort("G4", 296)
def test_gptq_compensates_errors() -> None:
    """The incumbent multiplies by zeros: its codes are those of round to nearest."""
    model = make_model(ONE)
    held_back = correlated(2, seed=1)

    def quality(module: str, config: str, **settings: Any) -> float:
        def algorithm(tool: Any) -> Any:
            given = {**settings}
            if config.startswith("GPTQ"):
                given["calibration_data_reader"] = Reader(correlated(4, seed=0))
            return getattr(tool, config)(**given)

        tool_settings = {"block_size": 32, "algo_config": algorithm}
        made = quantized(module, model, **tool_settings)
        return min(sqnr(run(model, batch), run(made, batch)) for batch in held_back)

    gptq, rtn = (quality(OWN, f"{name}WeightOnlyQuantConfig") for name in ("GPTQ", "RTN"))
    hqq = quality(OWN, "HQQWeightOnlyQuantConfig", block_size=32)
    assert gptq > max(rtn, hqq) + 1
    theirs, their_rtn = (
        quality(INCUMBENT, f"{name}WeightOnlyQuantConfig") for name in ("GPTQ", "RTN")
    )
    assert theirs < their_rtn + 0.5


@pytest.mark.ort("G20", 291)
def test_nodes_to_include_are_the_only_ones() -> None:
    """The incumbent quantizes every MatMul anyway."""
    model = make_model(CHAIN)
    settings: dict[str, Any] = {"nodes_to_include": ["/y"], "block_size": 32}
    assert types_of(quantized(OWN, model, **settings)) == ["MatMul", "MatMulNBits"]
    assert types_of(quantized(INCUMBENT, model, **settings)) == ["MatMulNBits", "MatMulNBits"]


@pytest.mark.ort("G21", 294)
def test_round_to_nearest_has_the_bits_asked_for() -> None:
    """The incumbent's RTN writes 4 bits."""
    model = make_model(ONE)
    settings = {"bits": 8, "block_size": 32, "algo_config": lambda t: t.RTNWeightOnlyQuantConfig()}
    own, theirs = (
        attributes_of(node_of(quantized(module, model, **settings), "MatMulNBits"))["bits"]
        for module in (OWN, INCUMBENT)
    )
    assert (own, theirs) == (8, 4)


@pytest.mark.ort("G21", 291)
def test_gptq_leaves_excluded_nodes() -> None:
    """The incumbent's GPTQ does not look at ``nodes_to_exclude``."""
    model = make_model(CHAIN)

    def algorithm(tool: Any) -> Any:
        return tool.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(correlated(1, 0)))

    settings: dict[str, Any] = {
        "nodes_to_exclude": ["/y"],
        "block_size": 32,
        "algo_config": algorithm,
    }
    assert types_of(quantized(OWN, model, **settings)) == ["MatMulNBits", "MatMul"]
    assert types_of(quantized(INCUMBENT, model, **settings)).count("MatMulNBits") == 2


@pytest.mark.ort("G22", 293)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # the incumbent
def test_the_axis_of_hqq_counts() -> None:
    """The incumbent never reads it."""
    model = make_model(ONE)

    def codes(module: str, axis: int) -> list[bytes]:
        made = quantized(
            module,
            model,
            algo_config=lambda tool: tool.HQQWeightOnlyQuantConfig(block_size=32, axis=axis),
        )
        return [tensor.raw_data for tensor in made.graph.initializer]

    assert codes(INCUMBENT, 0) == codes(INCUMBENT, 1)
    try:
        assert codes(OWN, 0) != codes(OWN, 1)
    except ValueError as error:
        logging.getLogger(__name__).info("refused: %s", error)


@pytest.mark.ort("G47", 285)
def test_a_weight_of_two_products_is_dequantized_once() -> None:
    """The incumbent defines its output twice: no session opens the file."""
    case = Case("h = MatMul(x, w) r = Relu(h) y = MatMul(r, w)", WIDE, {"y": 2}, {"w": (128, 128)})
    model = make_model(case, opset=21)
    batch = correlated(1, 0)[0]

    def pairs(module: str) -> ModelProto:
        form = importlib.import_module(f"{module}.quant_utils").QuantFormat.QDQ
        return quantized(module, model, block_size=32, quant_format=form)

    assert sqnr(run(model, batch), run(pairs(OWN), batch)) > 15
    with pytest.raises(INVALID):
        open_session(pairs(INCUMBENT))


@pytest.mark.ort("G56", 271)
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_pairs_of_blocks_raise_the_opset_by_converting(opset: int) -> None:
    """The incumbent sets the number alone: operators whose inputs moved are invalid."""
    nodes = {
        11: "s = ReduceSum<axes=[0], keepdims=1>(x) h = Add(x, s) y = MatMul(h, w)",
        13: "s = ReduceMax<axes=[0], keepdims=1>(x) h = Add(x, s) y = MatMul(h, w)",
    }
    model = make_model(Case(nodes, WIDE, {"y": 2}, {"w": (128, 64)}), opset)
    batch = correlated(1, 0)[0]

    def pairs(module: str) -> ModelProto:
        form = importlib.import_module(f"{module}.quant_utils").QuantFormat.QDQ
        return quantized(module, model, block_size=32, quant_format=form)

    assert sqnr(run(model, batch), run(pairs(OWN), batch)) > 10
    with pytest.raises(INVALID):
        open_session(pairs(INCUMBENT))


@pytest.mark.ort("G46", 274)
def test_nodes_with_bodies_keep_their_domain() -> None:
    """The incumbent copies them without it."""
    body = onnx.parser.parse_graph("body (float[N,128] i) => (float[N,64] o) { o = MatMul(i, w) }")
    model = make_model(ONE)
    node = onnx.helper.make_node("Repeat", ["x"], ["z"], domain="com.example", body=body)
    model.graph.node.append(node)
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    for module, domain in ((OWN, "com.example"), (INCUMBENT, "")):
        assert node_of(quantized(module, model, block_size=32), "Repeat").domain == domain


@pytest.mark.ort("G62", 47)
def test_packing_is_not_a_loop() -> None:
    """The incumbent packs byte by byte in Python."""
    values = np.random.default_rng(0).integers(0, 16, 2_000_000, np.uint8).tobytes()

    def seconds(module: str) -> float:
        pack = importlib.import_module(f"{module}.quant_utils").pack_bytes_to_4bit
        start = time.process_time()
        pack(values)
        return time.process_time() - start

    assert min(seconds(OWN) for _ in range(3)) * 20 < min(seconds(INCUMBENT) for _ in range(2))
