import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.prepare import plan_of, stubs


def test_a_prepared_model_still_computes_in_float(small) -> None:
    x = torch.from_numpy(small.batches()[0])
    model = qwrap.load(small.convs())
    expected = model(x)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert torch.equal(model(x), expected)


def test_parameters_stay_the_objects_that_an_optimizer_holds(small) -> None:
    model = qwrap.load(small.convs())
    before = dict(model.named_parameters())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    after = dict(model.named_parameters())
    assert all(name.endswith(".gain") for name in after.keys() - before.keys())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_preparing_again_starts_afresh(small, quantized) -> None:
    model = quantized(small.convs()).model
    plan = qwrap.prepare(model, qwrap.QConfig(scope="kernels", excluded=["/a"]))
    assert model.plan is plan
    assert plan.nodes["/a"].role == "float"
    x = torch.from_numpy(small.batches()[0])
    assert torch.equal(model(x), qwrap.load(small.convs())(x))
    qwrap.calibrate(model, small.batches(), progress=False)
    assert not torch.equal(model(x), qwrap.load(small.convs())(x))


def test_trained_weights_are_what_is_quantized(small) -> None:
    model = qwrap.load(small.convs())
    with torch.no_grad():
        model.stored("w1").mul_(3)
    x = torch.from_numpy(small.batches()[0])
    expected = model(x)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert torch.equal(model(x), expected)


def test_the_float_model_stays_what_it_was_when_prepared(small) -> None:
    model = qwrap.load(small.convs()).eval()
    x = torch.from_numpy(small.batches()[0])
    with torch.no_grad():
        model.w1.mul_(2)  # trained before ...
        before = model(x)
        qwrap.prepare(model)
        model.w1.add_(1)  # ... and after
        assert torch.equal(float_model(model)(x), before)


def test_batch_normalization_is_folded_and_said_so(small) -> None:
    nodes = "a = Conv(x, w, b) n = BatchNormalization(a, s, t, m, v) r = Relu(n) y = Conv(r, u)"
    weights = {"w": (6, 3, 3, 3), "b": (6,), "s": (6,), "t": (6,), "m": (6,), "u": (4, 6, 3, 3)}
    source = small.build(nodes, weights | {"v": np.full(6, 2.0, np.float32)})
    model = qwrap.load(source).eval()
    x = torch.from_numpy(small.batches()[0])
    expected = model(x)
    plan = qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert "/n" not in plan.nodes
    assert any("BatchNormalization" in line for line in plan.changes)
    assert "changed:" in plan.summary()
    # Weights are scaled in float64 and rounded once: 1e-6 of the largest output.
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_setting_changed_afterwards_changes_nothing(small) -> None:
    config = qwrap.QConfig(scope="kernels")
    model = qwrap.load(small.convs())
    qwrap.prepare(model, config)
    config.method = "minmax"
    config.exclude("Conv")
    qwrap.calibrate(model, small.batches(), progress=False)
    other = qwrap.load(small.convs())
    qwrap.prepare(other, qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(other, small.batches(), progress=False)
    x = torch.from_numpy(small.batches()[0])
    assert torch.equal(model(x), other(x))


def test_a_refused_setting_leaves_a_model_that_works(small) -> None:
    model = qwrap.load(small.convs())
    x = torch.from_numpy(small.batches()[0])
    expected = model(x)
    with pytest.raises(ConfigError, match="no node has such a name"):
        qwrap.prepare(model, qwrap.QConfig(scope="kernels", excluded=["nothing"]))
    assert torch.equal(model(x), expected)
    with pytest.raises(ConfigError, match="not prepared"):
        plan_of(model)


def test_training_after_calibration_changes_weights_and_the_export(small, quantized) -> None:
    result = quantized(small.convs())
    model, before = result.model, result.path.read_bytes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.from_numpy(small.batches()[0])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved >= {"w1", "b1", "w2", "b2"}
    assert len([name for name in moved if name.endswith(".gain")]) == len(moved) - 4
    qwrap.export(model, result.path)
    assert result.path.read_bytes() != before
    assert result.verify().deployed.differing == 0


def test_the_gradient_is_that_of_the_float_model_where_nothing_is_clamped(small) -> None:
    """Straight through: fine grids change values a little, and gradients with them."""
    source = small.convs()
    model, floating = qwrap.load(source), qwrap.load(source)
    fine = {"activation": "uint16", "weight": "int16", "weight_method": "minmax"}
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", method="minmax", **fine))
    x = torch.from_numpy(small.batches()[0])
    qwrap.calibrate(model, [x], progress=False)
    for m in (model, floating):
        m(x).square().mean().backward()
    # Two grids of 2^16 steps: relative noise of some 1e-4.
    for name in ("w1", "w2", "b2"):
        found, expected = model.stored(name).grad, floating.stored(name).grad
        assert (found - expected).norm() < 2e-3 * expected.norm(), name


@pytest.mark.parametrize("training", [True, False])
def test_what_is_prepared_is_in_the_mode_of_the_model(small, training: bool) -> None:
    model = qwrap.load(small.convs()).train(training)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", training="follow"))
    assert {stub.training for _, stub in stubs(model)} == {training}
    batches = small.batches()
    qwrap.calibrate(model, batches, progress=False)
    scales = [stub.scale.clone() for _, stub in stubs(model)]
    model(3 * torch.from_numpy(batches[0]))
    same = [
        torch.equal(stub.scale, scale)
        for (_, stub), scale in zip(stubs(model), scales, strict=True)
    ]
    assert all(same) != training
