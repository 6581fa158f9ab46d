import numpy as np
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.model.points import UsePoint


def calibrated(source, batches, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def channel_means(model, batches):
    with torch.no_grad():
        outputs = torch.cat([model(torch.from_numpy(b)) for b in batches])
    return outputs.mean([0, *range(2, outputs.dim())])


def positive_batches(small):
    """A mean far from 0, so that errors of weights show in the mean of the output."""
    return [np.abs(b) for b in small.batches(4, (4, 3, 8, 8))]


def test_a_shift_of_the_mean_is_taken_out(small) -> None:
    source, batches = small.convs(), positive_batches(small)
    model = calibrated(source, batches)
    model.tap(UsePoint("/y", 1)).scale.mul_(1.3)  # coarser weights, whose errors do not cancel
    wanted = channel_means(qwrap.load(source), batches)
    before = (channel_means(model, batches) - wanted).abs().max()
    assert qwrap.correct_biases(model, batches)
    after = (channel_means(model, batches) - wanted).abs().max()
    # What is left is that two batches teach what four are measured on.
    assert after <= before / 5


def test_one_layer_is_corrected_by_its_mean_error(small) -> None:
    """In closed form: the bias moves by mean(float output) - mean(quantized output)."""
    source = small.build(
        "y = Gemm(x, w, b)", {"w": (12, 20), "b": (20,)}, "float[N,12] x", "float[N,20] y"
    )
    batches = [np.abs(b) for b in small.batches(2, (64, 12))]
    model = calibrated(source, batches, per_channel=False)
    learned = batches[:1]  # the other half decides
    wanted = channel_means(qwrap.load(source), learned)
    shift = wanted - channel_means(model, learned)
    before = model.stored("b").detach().clone()
    if qwrap.correct_biases(model, batches):
        # float32 sums of 64 values of about 3
        torch.testing.assert_close(model.stored("b") - before, shift, rtol=0, atol=1e-5)
    else:
        assert torch.equal(model.stored("b"), before)


def test_a_correction_that_does_not_help_is_taken_back(small) -> None:
    """What the first batch teaches is the opposite of what the second one needs."""
    source = small.build(
        "y = Gemm(x, w, b)", {"w": (12, 20), "b": (20,)}, "float[N,12] x", "float[N,20] y"
    )
    ones = np.ones((2, 12), np.float32)
    model = calibrated(source, [ones, -ones])
    model.tap(UsePoint("/y", 1)).scale.mul_(0.7)  # clamps the largest weights
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    assert not qwrap.correct_biases(model, [ones, -ones])
    assert qwrap.correct_biases(model, [ones]), "without the second batch it would be kept"
    model.load_state_dict(before, strict=False)
    assert not qwrap.correct_biases(model, [ones, -ones])
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_shared_bias_is_left_alone(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w, b) c = Relu(a) y = Conv<pads=[1,1,1,1]>(c, u, b)"
    source = small.build(nodes, {"w": (3, 3, 3, 3), "u": (3, 3, 3, 3), "b": (3,)})
    batches = positive_batches(small)
    model = calibrated(source, batches)
    before = model.stored("b").detach().clone()
    assert not qwrap.correct_biases(model, batches)
    assert torch.equal(model.stored("b"), before)


def test_a_model_without_biases_is_left_alone(small) -> None:
    source = small.build("y = Conv(x, w)", {"w": (4, 3, 3, 3)})
    assert not qwrap.correct_biases(calibrated(source, small.batches()), small.batches())


def test_exact_and_export_use_the_corrected_bias(small, tmp_path) -> None:
    source, batches = small.convs(), positive_batches(small)
    model = calibrated(source, batches)
    with torch.no_grad():
        model.tap(UsePoint("/y", 1)).scale.mul_(1.3)
    assert qwrap.correct_biases(model, batches)
    qwrap.export(model, tmp_path / "q.onnx")
    report = qwrap.verify(model, tmp_path / "q.onnx", batches, progress=False)
    assert report.deployed.differing == 0


def test_modes_are_restored_and_nothing_but_biases_changes(small) -> None:
    source, batches = small.convs(), positive_batches(small)
    model = calibrated(source, batches)
    model.train()
    model.tap(UsePoint("/y", 1)).scale.mul_(1.3)
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    assert qwrap.correct_biases(model, batches)
    assert model.training
    changed = {k for k, v in before.items() if not torch.equal(model.state_dict()[k], v)}
    assert changed <= {"b1", "b2"}


def test_no_batches_and_unprepared_models_are_refused(small) -> None:
    with pytest.raises(InputError, match="no batches"):
        qwrap.correct_biases(calibrated(small.convs(), small.batches()), [])
    with pytest.raises(ConfigError, match="not prepared"):
        qwrap.correct_biases(qwrap.load(small.convs()), small.batches())


def test_integer_outputs_do_not_decide(small) -> None:
    nodes = "a = Conv(x, w, b) y = Relu(a) i = ArgMax<axis=1>(a)"
    source = small.build(
        nodes, {"w": (4, 3, 3, 3), "b": (4,)}, outputs="float[N,4,6,6] y, int64[N,1,6,6] i"
    )
    batches = positive_batches(small)
    model = calibrated(source, batches)
    model.tap(UsePoint("/a", 1)).scale.mul_(2.0)
    assert qwrap.correct_biases(model, batches)
    assert numpy_helper.to_array(source.graph.initializer[1]).shape == (4,)
