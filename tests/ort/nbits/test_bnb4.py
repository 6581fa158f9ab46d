"""MatMulBnb4Quantizer beside the incumbent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_bnb4_quantizer as incumbent
import pytest
from nbits_files import attributes, constants, drawn, model_of, product, run, walk
from onnx import helper

import qwrap.ort.matmul_bnb4_quantizer as ours

pytestmark = pytest.mark.ort(302, 303)


def processed(module: Any, source: onnx.ModelProto, *settings: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(source.SerializeToString())
    quantizer = module.MatMulBnb4Quantizer(copy, *settings)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("quant_type", [0, 1])
def test_files_are_equal(quant_type: int, block: int, dtype: type) -> None:
    source = product(drawn(72, 24, dtype=dtype))
    a, b = (processed(m, source, quant_type, block) for m in (ours, incumbent))
    assert a.graph.node == b.graph.node
    assert a.opset_import == b.opset_import
    first, second = constants(a.graph), constants(b.graph)
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    x = {"x": drawn(3, 72, seed=1, dtype=dtype)}
    np.testing.assert_array_equal(run(a, x)[0], run(b, x)[0])


@pytest.mark.ort(274)
def test_bodies_and_exclusions() -> None:
    def body(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", "w"], [name], name=f"/{name}")
        info = helper.make_tensor_value_info(name, 1, None)
        return helper.make_graph([node], name, [], [info])

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("a"), else_branch=body("b"))
    source = model_of([node], {"w": drawn(64, 64)}, {"x": ["B", 64]}, ["y"])
    source.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    model = processed(ours, source, 1, 64, ["/b"])
    types = {n.output[0]: n.op_type for n in walk(model.graph)}
    assert types == {"y": "If", "a": "MatMulBnb4", "b": "MatMul"}
    run(model, {"x": drawn(3, 64), "c": np.array(True)})


@pytest.mark.ort("G46")
def test_nodes_with_bodies_keep_their_domain() -> None:
    """onnxruntime's tool makes a node of ai.onnx of it."""
    body = helper.make_graph([], "body", [], [])
    node = helper.make_node("Own", ["x"], ["y"], domain="own.domain", name="own", body=body)
    source = model_of([node], {}, {"x": ["B", 64]}, ["y"])
    source.opset_import.append(helper.make_opsetid("own.domain", 1))
    files = [processed(m, source, 1, 64) for m in (ours, incumbent)]
    assert [file.graph.node[0].domain for file in files] == ["own.domain", ""]


@pytest.mark.parametrize("module", [ours, incumbent])
def test_other_types_are_refused(module: Any) -> None:
    with pytest.raises(AssertionError):
        module.MatMulBnb4Quantizer(product(drawn(64, 24)), 2, 64)


@pytest.mark.parametrize("module", [ours, incumbent])
def test_only_matrices_are_quantized(module: Any) -> None:
    quantizer = module.MatMulBnb4Quantizer(product(drawn(64, 24)), 1, 64)
    with pytest.raises(ValueError, match="only supports 2D tensors"):
        quantizer.bnb4_block_quant(drawn(2, 3, 4))
    packed, largest = quantizer.bnb4_block_quant(drawn(64, 24))
    assert (packed.shape, largest.shape) == ((64 * 12,), (24,))


def test_blocks_and_names_are_checked() -> None:
    """onnxruntime's tool writes blocks of 48, which no session runs, and takes any name."""
    with pytest.raises(ValueError, match="takes 16, 32, 64, 128, 256"):
        ours.MatMulBnb4Quantizer(product(drawn(64, 24)), 1, 48)
    with pytest.raises(ValueError, match="'prodct' does not exist; 'product'"):
        processed(ours, product(drawn(64, 24)), 1, 64, ["prodct"])


def test_the_command(tmp_path: Path) -> None:
    source, target = str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx")
    onnx.save(product(drawn(64, 24)), source)
    command = ["--input_model", source, "--output_model", target]
    ours.main([*command, "--quant_type", "0", "--block_size", "32", "-v"])
    (node,) = onnx.load(target).graph.node
    assert (attributes(node)["quant_type"], attributes(node)["block_size"]) == (0, 32)
    with pytest.raises(FileExistsError, match="already exists"):
        ours.main(command)
    ours.main([*command[:2], "--output_model", f"{target}.2", "--nodes_to_exclude", "product"])
    assert onnx.load(f"{target}.2").graph.node[0].op_type == "MatMul"
    assert vars(ours.parse_args(command)) == {
        "input_model": source,
        "output_model": target,
        "quant_type": 1,
        "block_size": 64,
        "verbose": False,
        "nodes_to_exclude": [],
    }
