"""Errors of samples, batch by batch or one by one."""

import numpy as np
import torch

import qwrap
from qwrap.quant.auto.held_out import HeldOut


def calibrated(small, source):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, small.batches(), progress=False)
    return model


@torch.no_grad()
def test_samples_of_a_batch_have_errors_of_their_own(small) -> None:
    source = small.convs()
    model, reference = calibrated(small, source), qwrap.load(source).eval()
    batches = [torch.from_numpy(b) for b in small.batches()]
    errors, powers = HeldOut(model, [{"x": b} for b in batches], sizes=[2, 2, 2]).errors()
    x = torch.cat(batches)
    wanted = reference(x).double()
    # sums of float32 in another order
    expected = (model(x).double() - wanted).square().sum((1, 2, 3))
    torch.testing.assert_close(errors[:, 0], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(powers[:, 0], wanted.square().sum((1, 2, 3)), rtol=1e-5, atol=0)


def test_without_sizes_a_batch_is_one_sample_and_parts_are_of_batches(small) -> None:
    model = calibrated(small, small.convs())
    batches = [{"x": torch.from_numpy(b)} for b in small.batches()]
    held_out = HeldOut(model, batches)
    errors, _ = held_out.errors()
    assert errors.shape == (3, 1)
    parts = [held_out.errors(part)[0] for part in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert torch.equal(torch.cat(parts), errors)
    assert [len(part) for part in parts] == [2, 1, 0]


def test_an_output_without_samples_on_its_first_axis_makes_the_batch_one(small) -> None:
    nodes = "y = Conv(x, w) s = ReduceSum<keepdims=0>(y)"
    source = small.build(nodes, {"w": (4, 3, 1, 1)}, outputs="float[N,4,H,W] y, float s")
    model = calibrated(small, source)
    errors, powers = HeldOut(
        model, [{"x": torch.from_numpy(small.batches()[0])}], sizes=[2]
    ).errors()
    assert errors.shape == powers.shape == (1, 2)


def test_integer_outputs_have_neither_error_nor_power(small) -> None:
    nodes = "y = Conv(x, w) i = ArgMax<axis=1>(y)"
    outputs = "float[N,4,H,W] y, int64[N,1,H,W] i"
    model = calibrated(small, small.build(nodes, {"w": (4, 3, 1, 1)}, outputs=outputs))
    held_out = HeldOut(model, [{"x": torch.from_numpy(b)} for b in small.batches()])
    errors, powers = held_out.errors()
    assert not errors[:, 1].any()
    assert not powers[:, 1].any()
    ratio = (errors.sum(0) / powers.sum(0))[0]
    assert np.isclose(held_out.error(), float(ratio), rtol=1e-12)
