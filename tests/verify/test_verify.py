import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qwrap.errors import InputError, ModelError
from qwrap.model import Program, ValuePoint
from qwrap.verify import verify


def ort_tensors(pair, names, optimised=False):
    """Tensors of the QDQ file over all batches, taken from onnxruntime by another road."""
    proto = onnx.load(pair.path)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    runs = [session.run(names, {"x": batch}) for batch in pair.batches]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def simulated(pair, name):
    values = []
    with torch.no_grad(), pair.model.watching({name: values.append}):
        for batch in pair.batches:
            pair.model(torch.from_numpy(batch))
    return torch.cat(values).numpy()


def test_an_equal_simulation_has_no_differing_code_at_either_level(make_pair) -> None:
    pair = make_pair()
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    for level in (report.specification, report.deployed):
        assert [t.name for t in level.tensors] == ["x", "h", "y"]
        assert level.elements == (9 + 10 + 11) * (12 + 16 + 5)
        assert (level.differing, level.worst_step, level.first_differing) == (0, 0, None)
        assert level.outputs[0].differing == 0
        assert level.sqnr == np.inf
        assert level.top1_agreement == 1.0
    assert report.passed()
    assert (report.notes, report.skipped, report.batches) == ((), (), 3)


@pytest.mark.parametrize("name", ["x", "h", "y"])
def test_a_wrong_scale_is_found_at_its_tensor(make_pair, name: str) -> None:
    scale, zero_point = {"x": (0.0301, 128), "h": (0.0512, 0), "y": (0.272, 117)}[name]
    pair = make_pair({name: (scale, zero_point)})
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    assert report.specification.first_differing == name
    assert report.deployed.first_differing == name
    assert not report.passed()


def test_a_wrong_zero_point_shows_where_it_moves_the_range(make_pair) -> None:
    pair = make_pair({"y": (0.27, 60)})
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    x, h, y = report.specification.tensors
    assert (x.differing, h.differing) == (0, 0)
    steps = np.round(simulated(pair, "y") / np.float32(0.27))  # code - 117: within [-117, 138]
    (codes,) = ort_tensors(pair, ["y_codes"])  # code - 60: within [-60, 195]
    clipped = (steps < -60) | (codes - 60.0 > 138)
    assert y.differing == np.count_nonzero(clipped) > 0
    assert y.worst_step == np.abs(steps - (codes - 60.0)).max()


def test_isolated_a_difference_does_not_travel(make_pair) -> None:
    pair = make_pair({"h": (0.06, 0)})
    travelling = verify(pair.model, pair.path, pair.batches, progress=False)
    isolated = verify(pair.model, pair.path, pair.batches, isolated=True, progress=False)
    for found, alone in (
        (travelling.specification, isolated.specification),
        (travelling.deployed, isolated.deployed),
    ):
        assert [t.differing > 0 for t in found.tensors] == [False, True, True]
        assert alone.tensors[1] == found.tensors[1]
    # The exact kernel of ``y`` is told the scale of ``h``, which is not the file's.
    assert [t.differing > 0 for t in isolated.specification.tensors] == [False, True, False]
    assert isolated.specification.outputs[0].differing == 0
    assert "onnxruntime's own values" in isolated.notes[0]


def test_isolated_an_equal_simulation_stays_equal(make_pair) -> None:
    pair = make_pair()
    report = verify(pair.model, pair.path, pair.batches, isolated=True, progress=False)
    assert report.specification.differing == report.deployed.differing == 0


def test_counts_are_those_of_brute_force(make_pair) -> None:
    pair = make_pair({"h": (0.06, 0)})
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    tensor = report.specification.tensors[1]
    (codes,) = ort_tensors(pair, ["h_codes"])
    values = simulated(pair, "h")
    steps = np.abs(np.round(values / np.float32(0.06)) - codes)
    assert tensor.elements == codes.size
    assert tensor.differing == np.count_nonzero(steps) > 0
    assert tensor.worst_step == steps.max()
    reference = codes.astype(np.float64) * np.float32(0.06)
    noise = np.sum((values - reference) ** 2)
    # float32 against float64 products: 1e-7 of the signal, beside noise of 1e-2 of it
    assert tensor.sqnr == pytest.approx(10 * np.log10(np.sum(reference**2) / noise), abs=1e-3)


def test_output_figures_are_those_of_brute_force(make_pair) -> None:
    pair = make_pair({"y": (9.0, 117)})  # so coarse that rows have several largest values
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    output = report.specification.outputs[0]
    (reference,) = ort_tensors(pair, ["y"])
    values = simulated(pair, "y")
    assert output.differing == np.count_nonzero(values != reference)
    assert output.max_abs_difference == np.abs(values.astype(float) - reference).max()
    assert output.top1_agreement == np.mean(values.argmax(1) == reference.argmax(1)) < 1
    noise = np.sum((values.astype(float) - reference) ** 2)
    expected = 10 * np.log10(np.sum(reference.astype(float) ** 2) / noise)
    assert output.sqnr == pytest.approx(expected, rel=1e-12)


def test_quantization_error_is_the_file_against_the_float_file(make_pair) -> None:
    pair = make_pair()
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    session = onnxruntime.InferenceSession(pair.float_path)
    wanted = np.concatenate([session.run(None, {"x": b})[0] for b in pair.batches]).astype(float)
    (got,) = ort_tensors(pair, ["y"], optimised=True)
    expected = 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2))
    # the float model runs in torch here, in onnxruntime there: 1e-7 beside an error of 1e-2
    assert report.quantization[0].sqnr == pytest.approx(expected, abs=1e-3)
    assert 20 < expected < 60


def test_without_an_exact_program_the_deployed_level_says_so(make_pair) -> None:
    pair = make_pair(exact=False)
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    assert report.deployed.simulation == "training form"
    assert "no exact program" in report.notes[0]
    assert "no exact program" in str(report)


def test_without_tensors_only_outputs_are_compared(make_pair) -> None:
    pair = make_pair({"h": (0.06, 0)})
    report = verify(pair.model, pair.path, pair.batches, tensors=False, progress=False)
    assert (report.codes, report.skipped) == (0, ())
    assert report.deployed.outputs[0].differing > 0
    assert not report.passed()


def test_a_simulation_that_returns_nan_differs_without_end(make_pair) -> None:
    pair = make_pair(exact=False)
    pair.model.attach({ValuePoint("h"): torch.nn.Threshold(1e9, float("nan"))})
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    tensor = report.specification.tensors[1]
    assert tensor.differing == tensor.elements
    assert (tensor.worst_step, tensor.sqnr) == (np.inf, -np.inf)
    assert not report.passed(max_differing=1.0, min_sqnr=0.0)


def test_a_value_the_type_cannot_hold_differs(make_pair) -> None:
    pair = make_pair(exact=False)
    pair.model.attach({})  # nothing clips, while QuantizeLinear does
    pair.batches = [np.full((1, 12), 30.0, np.float32)]
    report = verify(pair.model, pair.path, pair.batches, progress=False)
    assert report.specification.tensors[0].worst_step == 1000 + 128 - 255


def test_the_model_is_left_as_it_was(make_pair) -> None:
    pair = make_pair()
    pair.model.train()
    before = pair.model.source
    verify(pair.model, pair.path, pair.batches, progress=False)
    assert pair.model.training
    assert pair.model.source == before
    assert all(p.grad is None and p.requires_grad for p in pair.model.parameters())


def test_tensors_are_shared_not_copied(make_pair) -> None:
    pair = make_pair()
    seen = []

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.weight.data_ptr())
            return x

    probe = Probe()
    pair.model.attach({ValuePoint("h"): probe})
    verify(pair.model, pair.path, pair.batches, progress=False)
    assert set(seen) == {probe.weight.data_ptr()}


def test_a_one_shot_iterator_with_labels_is_enough(make_pair) -> None:
    pair = make_pair()
    batches = ((torch.from_numpy(b), "label") for b in pair.batches)
    assert verify(pair.model, pair.path, batches, progress=False).batches == 3


def test_a_program_that_is_running_does_not_replace_the_training_form(make_pair) -> None:
    pair = make_pair()
    with pair.model.running(Program()):
        report = verify(pair.model, pair.path, pair.batches, progress=False)
    assert report.passed()
    assert report.specification.differing == 0


def test_nothing_is_printed_where_no_terminal_is(make_pair, capfd) -> None:
    pair = make_pair()
    verify(pair.model, pair.path, pair.batches)
    assert capfd.readouterr() == ("", "")


def test_no_batches(make_pair) -> None:
    pair = make_pair()
    with pytest.raises(InputError, match="no batches"):
        verify(pair.model, pair.path, [], progress=False)


def test_no_file(make_pair, tmp_path) -> None:
    pair = make_pair()
    with pytest.raises(ModelError, match="no such file"):
        verify(pair.model, tmp_path / "absent.onnx", pair.batches, progress=False)


def test_a_file_that_is_no_model(make_pair, tmp_path) -> None:
    pair = make_pair()
    (tmp_path / "text.onnx").write_bytes(pair.path.read_bytes()[:100])
    with pytest.raises(ModelError, match="not an ONNX model, or cut off"):
        verify(pair.model, tmp_path / "text.onnx", pair.batches, progress=False)


def test_a_file_that_onnxruntime_refuses(make_pair, capfd) -> None:
    pair = make_pair()
    proto = onnx.load(pair.path)
    proto.graph.node[0].domain = "nobody.knows"
    proto.opset_import.add(domain="nobody.knows", version=1)
    onnx.save(proto, pair.path)
    with pytest.raises(ModelError, match=r"small\.qdq\.onnx: onnxruntime refuses the model"):
        verify(pair.model, pair.path, pair.batches, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_file_of_another_model(make_pair, kind: str) -> None:
    pair = make_pair()
    proto = onnx.load(pair.path)
    getattr(proto.graph, kind)[0].name = "other"
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if n == kind[0].replace("i", "x").replace("o", "y") else n
                        for n in names]  # fmt: skip
    onnx.save(proto, pair.path)
    with pytest.raises(ModelError, match=rf"graph {kind}s \['other'\] are not those of the model"):
        verify(pair.model, pair.path, pair.batches, progress=False)


def test_a_batch_that_onnxruntime_cannot_run(make_pair) -> None:
    pair = make_pair()
    with pytest.raises(InputError, match=r"onnxruntime fails on inputs of shape .*\[2, 13\]"):
        verify(pair.model, pair.path, [np.zeros((2, 13), np.float32)], progress=False)


def test_a_tensor_of_another_shape(make_pair) -> None:
    pair = make_pair(exact=False)
    pair.model.attach({ValuePoint("x"): torch.nn.ZeroPad2d((0, 0, 0, 1))})
    with pytest.raises(ModelError, match=r"tensor 'x': shape \[10, 12\] here, \[9, 12\]"):
        verify(pair.model, pair.path, pair.batches, progress=False)
