"""Names, constants and small look-ups, side by side with onnxruntime's."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from qwrap.ort import quant_utils


@pytest.mark.ort(365)
@pytest.mark.parametrize(
    "name",
    [
        "add_quant_suffix",
        "add_quant_input_suffix",
        "add_quant_output_suffix",
        "add_dequant_suffix",
        "add_dequant_input_suffix",
        "add_dequant_output_suffix",
    ],
)
def test_added_names_are_the_incumbents(name: str) -> None:
    assert getattr(quant_utils, name)("t") == getattr(incumbent, name)("t")


@pytest.mark.ort(365, 37)
@pytest.mark.parametrize(
    "name",
    [
        "__producer__",
        "__version__",
        "onnx_domain",
        "ms_domain",
        "QUANT_OP_NAME",
        "DEQUANT_OP_NAME",
        "QUANT_INPUT_SUFFIX",
        "DEQUANT_OUTPUT_SUFFIX",
        "TENSOR_NAME_QUANT_SUFFIX",
        "MODEL_SIZE_THRESHOLD",
        "FLOAT8_TYPES",
        "ONNX_TYPE_TO_NP_TYPE",
        "type_to_name",
        "ONNX_INT_TYPE_RANGE",
        "ONNX_INT_TYPE_SYMMETRIC_RANGE",
        "ONNX_INT_TYPE_REDUCED_RANGE",
    ],
)
def test_constants_are_the_incumbents(name: str) -> None:
    assert getattr(quant_utils, name) == getattr(incumbent, name)


ATTRIBUTES = [
    helper.make_attribute("a", value)
    for value in (
        1.5,
        3,
        "text",
        numpy_helper.from_array(np.ones(2), "t"),
        helper.make_graph([], "g", [], []),
        [1.5, 2.5],
        [1, 2],
        ["x", "y"],
        [numpy_helper.from_array(np.ones(2), "t")],
        [helper.make_graph([], "g", [], [])],
    )
]


@pytest.mark.ort(364)
@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=range(1, 11))
def test_attributes_become_keywords(attribute: AttributeProto) -> None:
    assert quant_utils.attribute_to_kwarg(attribute) == incumbent.attribute_to_kwarg(attribute)


@pytest.mark.ort(364)
def test_attributes_without_a_known_type_are_refused() -> None:
    for module in (quant_utils, incumbent):
        with pytest.raises(ValueError, match="attribute a does not have type specified"):
            module.attribute_to_kwarg(AttributeProto(name="a"))
        with pytest.raises(ValueError, match="attribute a has unsupported type 13"):
            module.attribute_to_kwarg(AttributeProto(name="a", type=AttributeProto.TYPE_PROTO))


@pytest.mark.ort(364)
def test_items_are_found_by_name_and_elements_by_value() -> None:
    items = [helper.make_node("Relu", ["x"], ["y"], name) for name in ("a", "b", "a")]
    assert quant_utils.find_by_name("a", items) is items[0]
    assert quant_utils.find_by_name("c", items) is None
    for name in "abc":
        listed = ["a", "b", "a"]
        assert quant_utils.get_elem_index(name, listed) == incumbent.get_elem_index(name, listed)


@pytest.mark.ort(364)
def test_a_mul_node_is_made() -> None:
    arguments = (["a", "b"], "c", "n")
    assert quant_utils.get_mul_node(*arguments) == incumbent.get_mul_node(*arguments)


@pytest.mark.ort(364)
@pytest.mark.parametrize("path", ["m.onnx", "a/b.c/m.x.onnx", "/m", "a/m"])
def test_file_names_are_marked(path: str) -> None:
    found = quant_utils.generate_identified_filename(Path(path), "-inferred")
    assert found == incumbent.generate_identified_filename(Path(path), "-inferred")


@pytest.mark.ort(364)
def test_only_floats_become_arrays() -> None:
    for dtype in (np.float32, np.float16):
        tensor = numpy_helper.from_array(np.ones((2, 3), dtype), "w")
        assert quant_utils.tensor_proto_to_array(tensor).tobytes() == tensor.raw_data
    for module in (quant_utils, incumbent):
        with pytest.raises(ValueError, match=r"Only float type is supported. Weights w is DOUBLE"):
            module.tensor_proto_to_array(numpy_helper.from_array(np.ones(2), "w"))


@pytest.mark.ort(364)
@pytest.mark.parametrize("external", [False, True])
def test_external_data_is_seen(tmp_path: Path, external: bool) -> None:
    weight = numpy_helper.from_array(np.ones((32, 32), np.float32), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [32, 32]) for n in "xy")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    assert quant_utils.model_has_external_data(path) == external
    assert incumbent.model_has_external_data(path) == external


@pytest.mark.ort(17, 38)
def test_steps_are_marked_in_metadata() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    for what in ("pre_process", "infer"):
        has, add = f"model_has_{what}_metadata", f"add_{what}_metadata"
        assert not getattr(quant_utils, has)(model)
        getattr(quant_utils, add)(model)
        assert getattr(quant_utils, has)(model)
        assert getattr(incumbent, has)(model)
    assert len(model.metadata_props) == 2


@pytest.mark.ort(364)
def test_the_opset_of_the_default_domain_is_read() -> None:
    graph = helper.make_graph([], "g", [], [])
    imports = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("ai.onnx", 17)]
    assert quant_utils.get_opset_version(helper.make_model(graph, opset_imports=imports)) == 17
    for module in (quant_utils, incumbent):
        with pytest.raises(ValueError, match="Failed to find proper"):
            module.get_opset_version(helper.make_model(graph, opset_imports=imports[:1]))


@pytest.mark.ort(362)
def test_values_carry_the_incumbents_fields() -> None:
    for name, arguments in (
        ("QuantizedValue", ("t", "t_q", "t_s", "t_z", 0, 1, "Cast", 2, 3)),
        ("QuantizedInitializer", ("t", None, [0], [1], [2], [3], [4], [5], 6)),
        ("BiasToQuantize", ("b", "x", "w")),
    ):
        ours, theirs = (getattr(m, name)(*arguments) for m in (quant_utils, incumbent))
        assert vars(ours) == vars(theirs)
