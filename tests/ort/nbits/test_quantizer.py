"""MatMulNBitsQuantizer: every algorithm honours every setting, and names are checked."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import pytest
from nbits_files import (
    attributes,
    drawn,
    in_floats,
    lookup,
    model_of,
    product,
    run,
)
from onnx import helper

import qwrap.ort.matmul_nbits_quantizer as ours
from qwrap.ort.errors import QuantizationError

ALGORITHMS = ["DEFAULT", "HQQ", "RTN", "k_quant", "GPTQ"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Reader:
    """Batches as onnxruntime's readers give them."""

    def __init__(self, width: int = 64, name: str = "h0") -> None:
        self.batches = [{name: drawn(8, width, seed=i)} for i in range(4)]

    def get_next(self) -> dict[str, Any] | None:
        return self.batches.pop() if self.batches else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (batch := self.get_next()) is not None:
            yield batch


def chain(count: int = 3) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(count)}
    return model_of(nodes, weights, {"h0": ["B", 64]}, [f"h{count}"])


def config(algorithm: str, bits: int, block: int, symmetric: bool, types: Any = None) -> Any:
    if algorithm == "DEFAULT":
        return ours.DefaultWeightOnlyQuantConfig(
            block, symmetric, bits=bits, op_types_to_quantize=types
        )
    if algorithm == "HQQ":
        return ours.HQQWeightOnlyQuantConfig(block, bits, op_types_to_quantize=types)
    if algorithm == "RTN":
        return ours.RTNWeightOnlyQuantConfig(op_types_to_quantize=types)
    if algorithm == "k_quant":
        return ours.KQuantWeightOnlyQuantConfig(op_types_to_quantize=types)
    return ours.GPTQWeightOnlyQuantConfig(Reader(), op_types_to_quantize=types)


def quantized(algorithm: str, types: Any = None, **settings: Any) -> onnx.ModelProto:
    given = {"bits": 4, "block_size": 32, "is_symmetric": False} | settings
    algo = config(algorithm, given["bits"], given["block_size"], given["is_symmetric"], types)
    quantizer = ours.MatMulNBitsQuantizer(chain(), **given, algo_config=algo)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.ort(279, 290, 292, 293, 294, 295, 296)
@pytest.mark.parametrize(
    "name",
    [
        "MatMulNBitsQuantizer",
        "WeightOnlyQuantConfig",
        "DefaultWeightOnlyQuantConfig",
        "HQQWeightOnlyQuantConfig",
        "RTNWeightOnlyQuantConfig",
        "KQuantWeightOnlyQuantConfig",
        "GPTQWeightOnlyQuantConfig",
        "NVAWQWeightOnlyQuantConfig",
    ],
)
def test_signatures_and_defaults(name: str) -> None:
    a, b = (inspect.signature(getattr(m, name)).parameters for m in (ours, incumbent))
    assert list(a) == list(b)
    assert [str(p.default) for p in a.values()] == [str(p.default) for p in b.values()]


@pytest.mark.ort(279, 290, 301, 362)
def test_every_public_name_is_there() -> None:
    public = {
        name
        for name, value in vars(incumbent).items()
        if getattr(value, "__module__", "") == incumbent.__name__ and not name.startswith("_")
    }
    assert public <= set(ours.__all__)
    for name in ("DefaultWeightOnlyQuantizer", "HQQWeightOnlyQuantizer", "MatMulNBitsQuantizer"):
        methods = {n for n in vars(getattr(incumbent, name)) if not n.startswith("_")}
        assert methods <= {*vars(getattr(ours, name))}


@pytest.mark.ort(290)
def test_defaults_are_readable() -> None:
    plain = ours.DefaultWeightOnlyQuantConfig()
    assert plain.op_types_to_quantize == {"MatMul"}
    assert plain.quant_axes == {"MatMul": 0, "Gather": 1}
    assert plain.algorithm == "DEFAULT"


@pytest.mark.ort(280, 291, 293, 294, 295, 296, "G21")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 64), (8, 32)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_honours_bits_block_size_symmetry_and_exclusions(
    algorithm: str, bits: int, block: int, symmetric: bool
) -> None:
    """onnxruntime's RTN, k_quant and GPTQ make 4 bits of any, and its GPTQ excludes nothing."""
    model = quantized(
        algorithm,
        bits=bits,
        block_size=block,
        is_symmetric=symmetric,
        nodes_to_exclude=["/h2"],
        accuracy_level=1,
    )
    nodes = model.graph.node
    assert [n.op_type for n in nodes] == ["MatMulNBits", "MatMul", "MatMulNBits"]
    for node in (nodes[0], nodes[2]):
        given = attributes(node)
        assert (given["bits"], given["block_size"]) == (bits, block)
        has_zero_points = algorithm in ("HQQ", "k_quant") or not symmetric
        assert len(node.input) == 3 + has_zero_points
        assert ("accuracy_level" in given) == (algorithm != "DEFAULT")  # there the config says it
    x = {"h0": drawn(3, 64, seed=9)}
    (wanted,), (got,) = run(in_floats(model), x), run(model, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.ort("G21")
def test_what_onnxruntimes_rtn_makes_of_8_bits() -> None:
    quantizer = incumbent.MatMulNBitsQuantizer(
        chain(), bits=8, block_size=32, algo_config=incumbent.RTNWeightOnlyQuantConfig()
    )
    quantizer.process()
    assert {attributes(n)["bits"] for n in quantizer.model.model.graph.node} == {4}


@pytest.mark.ort(291, "G20")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_included_nodes_are_the_only_ones_unless_operators_are_given(algorithm: str) -> None:
    """onnxruntime's tool quantizes every MatMul anyway, so that including does nothing."""
    only = quantized(algorithm, nodes_to_include=["/h2"])
    assert [n.op_type for n in only.graph.node] == ["MatMul", "MatMulNBits", "MatMul"]
    more = quantized(algorithm, types=("MatMul",), nodes_to_include=["/h2"])
    assert [n.op_type for n in more.graph.node] == ["MatMulNBits"] * 3
    quantizer = incumbent.MatMulNBitsQuantizer(chain(), nodes_to_include=["/h2"])
    quantizer.process()
    assert [n.op_type for n in quantizer.model.model.graph.node] == ["MatMulNBits"] * 3


@pytest.mark.ort(291)
def test_included_nodes_of_another_operator_are_added_to_those_of_a_type() -> None:
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"t": drawn(40, 64), "w": drawn(64, 64)}
    source = model_of(nodes, weights, {"i": ["B"]}, ["y"], integers=["i"])
    quantizer = ours.MatMulNBitsQuantizer(
        source, block_size=32, op_types_to_quantize=("MatMul",), nodes_to_include=["/x"]
    )
    quantizer.process()
    types = [n.op_type for n in quantizer.model.model.graph.node]
    assert types == ["GatherBlockQuantized", "MatMulNBits"]


@pytest.mark.ort(291, "G24")
@pytest.mark.parametrize("key", ["nodes_to_exclude", "nodes_to_include"])
def test_unknown_nodes_are_refused(key: str) -> None:
    """onnxruntime's tool says nothing."""
    quantizer = ours.MatMulNBitsQuantizer(chain(), **{key: ["/h22"]})
    with pytest.raises(ValueError, match=f"{key} '/h22' does not exist; '/h2'"):
        quantizer.process()
    incumbent.MatMulNBitsQuantizer(chain(), **{key: ["/h22"]}).process()


@pytest.mark.ort(280)
@pytest.mark.parametrize("module", [ours, incumbent])
def test_other_bits_are_refused(module: Any) -> None:
    with pytest.raises(AssertionError, match="Only support 2, 4 or 8 bits quantization"):
        module.MatMulNBitsQuantizer(chain(), bits=3)


@pytest.mark.ort(283)
@pytest.mark.parametrize("block", [8, 20, 512])
@pytest.mark.parametrize("module", [ours, incumbent])
def test_blocks_that_no_kernel_reads_are_refused(module: Any, block: int) -> None:
    with pytest.raises(RuntimeError):
        module.MatMulNBitsQuantizer(chain(), block_size=block).process()


@pytest.mark.ort(298)
@pytest.mark.parametrize("name", ["RTN", "KQuant", "GPTQ", "HQQ"])
@pytest.mark.parametrize("module", [ours, incumbent])
def test_these_algorithms_write_operators_only(module: Any, name: str) -> None:
    with pytest.raises(AssertionError, match="only supports QOperator format"):
        getattr(module, f"{name}WeightOnlyQuantConfig")(quant_format=module.QuantFormat.QDQ)


@pytest.mark.ort(293, "G22")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hqq_along_another_axis_is_refused() -> None:
    """onnxruntime's tool takes ``axis=0`` and goes along axis 1."""
    algo = ours.HQQWeightOnlyQuantConfig(block_size=32, axis=0)
    with pytest.raises(QuantizationError, match="blocks along the inputs, axis=1"):
        ours.MatMulNBitsQuantizer(chain(), algo_config=algo).process()
    files = []
    for axis in (0, 1):
        algo = incumbent.HQQWeightOnlyQuantConfig(block_size=32, axis=axis)
        quantizer = incumbent.MatMulNBitsQuantizer(chain(), algo_config=algo)
        quantizer.process()
        files.append(quantizer.model.model)
    assert files[0] == files[1]


@pytest.mark.ort(293)
@pytest.mark.parametrize("module", [ours, incumbent])
def test_hqq_has_no_tables(module: Any) -> None:
    algo = module.HQQWeightOnlyQuantConfig(32, op_types_to_quantize=("Gather",))
    with pytest.raises(NotImplementedError, match="Gather quantization is not supported yet"):
        module.MatMulNBitsQuantizer(lookup(drawn(40, 64)), algo_config=algo).process()


@pytest.mark.ort(289)
@pytest.mark.parametrize("module", [ours, incumbent])
def test_tables_have_no_pairs(module: Any) -> None:
    with pytest.raises(AssertionError, match="Gather only supports QOperator format"):
        module.MatMulNBitsQuantizer(
            lookup(drawn(40, 64)),
            block_size=32,
            quant_format=module.QuantFormat.QDQ,
            op_types_to_quantize=("Gather",),
        ).process()


@pytest.mark.ort(285)
@pytest.mark.parametrize(("bits", "opset"), [(2, 25), (8, 21)])
def test_pairs_of_other_bits_than_4_are_written(bits: int, opset: int) -> None:
    """onnxruntime's tool leaves the node at 8 bits, and asserts that there are no 2."""
    quantizer = ours.MatMulNBitsQuantizer(
        chain(1), bits=bits, block_size=32, quant_format=ours.QuantFormat.QDQ
    )
    quantizer.process()
    model = quantizer.model.model
    assert model.opset_import[0].version == opset
    x = {"h0": drawn(3, 64, seed=9)}
    (wanted,), (got,) = run(in_floats(model), x), run(model, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.ort(296)
def test_gptq_needs_data_and_leaves_the_reader_as_it_was() -> None:
    with pytest.raises(QuantizationError, match="calibration_data_reader"):
        ours.MatMulNBitsQuantizer(chain(), algo_config=ours.GPTQWeightOnlyQuantConfig()).process()
    reader = Reader()
    algo = ours.GPTQWeightOnlyQuantConfig(reader)
    ours.MatMulNBitsQuantizer(chain(), block_size=32, algo_config=algo).process()
    assert len(reader.batches) == 4


@pytest.mark.ort(297)
def test_awq_on_public_text_says_what_it_lacks() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ImportError, match=r"datasets is not installed.*method='awq'"):
        ours.NVAWQWeightOnlyQuantConfig("nowhere")


@pytest.mark.ort(279, 275)
@pytest.mark.parametrize("kind", ["message", "text", "path"])
def test_a_model_is_a_message_or_a_path_and_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    source = chain()
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    source = onnx.load(tmp_path / "m.onnx")
    before = source.SerializeToString()
    given = {"message": source, "text": str(tmp_path / "m.onnx"), "path": tmp_path / "m.onnx"}
    quantizer = ours.MatMulNBitsQuantizer(given[kind], block_size=32)
    assert [n.op_type for n in quantizer.model.nodes()] == ["MatMul"] * 3
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"), True)
    assert source.SerializeToString() == before
    x = {"h0": drawn(3, 64, seed=9)}
    written = onnx.load(tmp_path / "q.onnx")
    np.testing.assert_array_equal(run(str(tmp_path / "q.onnx"), x)[0], run(written, x)[0])
    assert str(quantizer.report).startswith("3 of 3 nodes quantized")


@pytest.mark.ort("G46")
def test_nodes_with_bodies_keep_their_domain() -> None:
    """onnxruntime's tool makes a node of ai.onnx of it, which is unknown."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h0", "w0"], ["z"], name="inner")],
        "body",
        [],
        [helper.make_tensor_value_info("z", 1, None)],
    )
    node = helper.make_node("Own", ["h0"], ["y"], domain="own.domain", name="own", body=body)
    source = model_of([node], {"w0": drawn(64, 64)}, {"h0": ["B", 64]}, ["y"])
    source.opset_import.append(helper.make_opsetid("own.domain", 1))
    files = []
    for module in (ours, incumbent):
        quantizer = module.MatMulNBitsQuantizer(
            onnx.ModelProto.FromString(source.SerializeToString())
        )
        quantizer.process()
        files.append(quantizer.model.model)
    assert [file.graph.node[0].domain for file in files] == ["own.domain", ""]
    assert files[0].graph.node[0].attribute[0].g.node[0].op_type == "MatMulNBits"


@pytest.mark.ort("G47")
def test_onnxruntimes_tool_defines_a_shared_weights_value_twice() -> None:
    nodes = [helper.make_node("MatMul", [x, "w"], [y]) for x, y in ("xh", "hy")]
    source = model_of(nodes, {"w": drawn(64, 64)}, {"x": ["B", 64]}, ["y"])
    files = []
    for module in (ours, incumbent):
        quantizer = module.MatMulNBitsQuantizer(
            onnx.ModelProto.FromString(source.SerializeToString()),
            block_size=32,
            quant_format=module.QuantFormat.QDQ,
        )
        quantizer.process()
        files.append(quantizer.model.model)
    run(files[0], {"x": drawn(3, 64)})
    with pytest.raises(Exception, match="Duplicate definition of name"):
        run(files[1], {"x": drawn(3, 64)})


@pytest.mark.ort(287)
@pytest.mark.parametrize("algorithm", ["DEFAULT", "HQQ"])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_a_matrix_in_a_unit_dimension(shape: tuple[int, ...], algorithm: str) -> None:
    source = product(drawn(1, 64, 24), shape=list(shape))
    algo = config(algorithm, 4, 32, False)
    quantizer = ours.MatMulNBitsQuantizer(source, algo_config=algo)
    quantizer.process()
    x = {"x": drawn(*shape, seed=1)}
    (wanted,), (got,) = run(source, x), run(quantizer.model.model, x)
    assert wanted.shape == got.shape == (*(2, 3)[3 - len(shape) :], 24) or got.shape == (1, 3, 24)
    np.testing.assert_allclose(got, wanted, atol=0.8)  # 4 bits of 64 weights of about 0.3


@pytest.mark.ort(288)
@pytest.mark.parametrize("algorithm", ["DEFAULT", "HQQ", "RTN", "k_quant"])
def test_float16_models(algorithm: str) -> None:
    source = product(drawn(64, 24, dtype=np.float16))
    algo = config(algorithm, 4, 32, False)
    quantizer = ours.MatMulNBitsQuantizer(source, block_size=32, algo_config=algo)
    quantizer.process()
    model, x = quantizer.model.model, {"x": drawn(3, 64, seed=1, dtype=np.float16)}
    (wanted,), (got,) = run(in_floats(model), x), run(model, x)
    np.testing.assert_allclose(got, wanted, rtol=4e-3, atol=4e-3)  # float16 has 11 bits
