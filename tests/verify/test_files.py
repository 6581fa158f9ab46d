import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from qwrap.errors import InputError, ModelError
from qwrap.verify import verify_files


def outputs(path, batches) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return np.concatenate([session.run(None, {"x": b})[0] for b in batches]).astype(np.float64)


@pytest.mark.ort(350)
def test_figures_are_those_of_brute_force(make_pair) -> None:
    pair = make_pair()
    report = verify_files(pair.float_path, pair.path, pair.batches, progress=False)
    wanted, got = outputs(pair.float_path, pair.batches), outputs(pair.path, pair.batches)
    (figures,) = report.quantization
    assert figures.sqnr == pytest.approx(
        10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)), rel=1e-12
    )
    assert figures.max_abs_difference == np.abs(wanted - got).max()
    assert report.top1_agreement == np.mean(wanted.argmax(1) == got.argmax(1))
    assert report.sqnr == figures.sqnr
    assert report.codes == 30 * (12 + 16 + 5)
    assert report.batches == 3


def test_tensors_have_their_names_in_the_file(make_pair) -> None:
    pair = make_pair()
    report = verify_files(pair.float_path, pair.path, pair.batches, progress=False)
    assert [t.name for t in report.optimisation.tensors] == ["x", "h", "y_float"]
    assert report.optimisation.tensors[2].dequantized == ("y",)


def test_what_optimisations_change_is_counted(build, tmp_path) -> None:
    add = helper.make_node("Add", ["x", "x"], ["y"])
    onnx.save(build.model([add], [], width=12), tmp_path / "float.onnx")
    nodes, stored = build.pair("x", "x", "x_dq", 0.5, 128)
    more, tensors = build.pair("sum", "y", "y", 2.0, 129)
    nodes += [helper.make_node("Add", ["x_dq", "x_dq"], ["sum"]), *more]
    onnx.save(build.model(nodes, stored + tensors, width=12), tmp_path / "qdq.onnx")
    x = np.arange(-60, 60, dtype=np.float32).reshape(10, 12) / 2
    report = verify_files(tmp_path / "float.onnx", tmp_path / "qdq.onnx", [x], progress=False)
    # y / scale is half an integer for every second x. QuantizeLinear rounds it to even and adds
    # the odd zero point; QLinearAdd adds first, then rounds to even: one step apart.
    assert [t.differing for t in report.optimisation.tensors] == [0, 60]
    assert report.largest_steps == 1
    assert report.optimisation.first_differing == "sum"


def test_a_file_without_quantized_tensors_is_compared_by_its_outputs(make_pair) -> None:
    pair = make_pair()
    report = verify_files(pair.float_path, pair.float_path, pair.batches, progress=False)
    assert (report.codes, report.differing_codes) == (0, 0)
    assert report.sqnr == np.inf


def test_the_table_and_dict_hold_the_figures(make_pair) -> None:
    pair = make_pair()
    report = verify_files(pair.float_path, pair.path, pair.batches, progress=False)
    assert "the quantized file against the float file" in str(report)
    assert report.to_dict()["codes"] == report.codes


def test_files_of_different_models(make_pair, tmp_path) -> None:
    pair = make_pair()
    proto = onnx.load(pair.float_path)
    proto.graph.output[0].name = proto.graph.node[2].output[0] = "other"
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"graph outputs \['y'\] are not those of .*other"):
        verify_files(tmp_path / "other.onnx", pair.path, pair.batches, progress=False)


def test_no_batches(make_pair) -> None:
    pair = make_pair()
    with pytest.raises(InputError, match="no batches"):
        verify_files(pair.float_path, pair.path, iter(()), progress=False)
