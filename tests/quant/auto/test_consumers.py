"""Errors behind the operators that read a tensor, against the same computed by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qwrap
from qwrap.config import QuantSpec
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.auto.consumers import ConsumerErrors

SPEC = QuantSpec(dtype="uint8", symmetric=False)
RANGES = [(-1.0, 1.0), (-3.0, 3.0)]


def prepared(source):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    return model


def candidates(*keys: str):
    scales = [choose_qparams(torch.tensor(a), torch.tensor(b), SPEC) for a, b in RANGES]
    return dict.fromkeys(keys, scales)


def rounded(x: torch.Tensor, span) -> torch.Tensor:
    qparams = choose_qparams(torch.tensor(span[0]), torch.tensor(span[1]), SPEC)
    return fake_quantize(x, qparams.scale, qparams.zero_point, SPEC)


def measured(model, batches, *keys: str):
    errors = ConsumerErrors(model, candidates(*keys))
    errors.run([{"x": torch.from_numpy(batch)} for batch in batches])
    return errors.by_tensor(errors.sums())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


def test_the_error_is_that_of_the_convolution_behind(small) -> None:
    nodes = "y = Conv(x, w)"
    model = prepared(small.build(nodes, {"w": (4, 3, 1, 1)}))
    x = torch.from_numpy(small.batches()[0])
    weight = model.stored("w").detach()
    expected = [relative(F.conv2d(rounded(x, s), weight), F.conv2d(x, weight)) for s in RANGES]
    found = measured(model, small.batches(1), "x")["x"]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)  # float32 sums in another order


def test_an_absorbed_relu_hides_the_errors_it_cuts(small) -> None:
    model = prepared(small.convs())
    x = torch.from_numpy(small.batches()[0])
    w, b = (model.stored(name).detach() for name in ("w1", "b1"))

    def layer(x):
        return F.conv2d(x, w, b, padding=1).relu()

    expected = [relative(layer(rounded(x, span)), layer(x)) for span in RANGES]
    assert measured(model, small.batches(1), "x")["x"].tolist() == pytest.approx(expected, rel=1e-4)


def test_consumers_add_up_each_relative_to_its_output_and_moves_are_looked_through(small) -> None:
    nodes = "a = MaxPool<kernel_shape=[2,2]>(x) y = Conv(a, w) z = Conv(x, v)"
    weights = {"w": (4, 3, 1, 1), "v": np.full((4, 3, 1, 1), 1e3, np.float32)}
    outputs = "float[N,4,H,W] y, float[N,4,I,J] z"
    model = prepared(
        small.build(
            "p = Conv(x, u) " + nodes.replace("(x", "(p"),
            weights | {"u": np.eye(3).reshape(3, 3, 1, 1)},
            outputs=outputs,
        )
    )
    assert model.plan.tensors["a"].source == "p"
    p = torch.from_numpy(small.batches()[0])
    w, v = (model.stored(name).detach() for name in ("w", "v"))
    expected = []
    for span in RANGES:
        pooled, plain = (F.max_pool2d(t, 2, 1) for t in (p, p))
        behind_pool = relative(F.conv2d(rounded(pooled, span), w), F.conv2d(plain, w))
        expected.append(behind_pool + relative(F.conv2d(rounded(p, span), v), F.conv2d(p, v)))
    found = measured(model, small.batches(1), "p")["p"]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_batches_add_up_each_relative_to_its_output(small) -> None:
    model = prepared(small.build("y = Conv(x, w)", {"w": (4, 3, 1, 1)}))
    weak, strong = (torch.from_numpy(b) for b in small.batches(2))
    strong = strong * 3
    weight = model.stored("w").detach()
    expected = [
        sum(
            relative(F.conv2d(rounded(x, span), weight), F.conv2d(x, weight))
            for x in (weak, strong)
        )
        for span in RANGES
    ]
    found = measured(model, [weak.numpy(), strong.numpy()], "x")["x"]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_both_inputs_of_a_product_with_itself_are_rounded(small) -> None:
    nodes = "a = Conv(x, w) b = Mul(a, a) y = Conv(b, v)"
    model = prepared(small.build(nodes, {"w": np.eye(3).reshape(3, 3, 1, 1), "v": (4, 3, 1, 1)}))
    a = torch.from_numpy(small.batches()[0])
    expected = [relative(rounded(a, span) ** 2, a**2) for span in RANGES]
    assert measured(model, small.batches(1), "a")["a"].tolist() == pytest.approx(expected, rel=1e-4)


def test_masked_outputs_do_not_drown_the_others(small) -> None:
    nodes = "a = Conv(x, w) b = Add(a, m) c = Softmax<axis=3>(b) y = Conv(c, v)"
    mask = np.where(np.arange(8) < 2, -3.4e38, 0).astype(np.float32)
    weights = {"w": np.eye(3).reshape(3, 3, 1, 1), "v": (4, 3, 1, 1), "m": mask}
    model = qwrap.load(small.build(nodes, weights)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert "a" in model.plan.tensors
    a = torch.from_numpy(small.batches()[0])[..., 2:]
    expected = [relative(rounded(a, span), a) for span in RANGES]
    assert measured(model, small.batches(1), "a")["a"].tolist() == pytest.approx(expected, rel=1e-4)


def test_outputs_are_those_of_the_float_model(small) -> None:
    model, reference = prepared(small.convs()), qwrap.load(small.convs()).eval()
    batches = [{"x": torch.from_numpy(b)} for b in small.batches()]
    found = ConsumerErrors(model, candidates("x", "b")).run(batches)
    for (output,), batch in zip(found, batches, strict=True):
        assert torch.equal(output, reference(**batch))


def test_what_nothing_computes_on_has_no_error(small) -> None:
    assert measured(prepared(small.convs()), small.batches(1), "y") == {}
