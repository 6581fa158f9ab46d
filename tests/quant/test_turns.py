"""What is learnt in turn, against rows and outputs by hand."""

import numpy as np
import torch

import qwrap
from qwrap.quant.layer_inputs import readers
from qwrap.quant.matrices import weight_matrices
from qwrap.quant.turns import learn_in_turn


def prepared(source, batches):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", activation=None, weight="int2"))
    qwrap.calibrate(model, batches, progress=False)
    return model


def test_each_layer_learns_behind_what_was_changed_before_it(small) -> None:
    nodes = "a = MatMul(x, v) b = Relu(a) y = Gemm(b, w, c)"
    source = small.build(
        nodes, {"v": (6, 5), "w": (5, 4), "c": (4,)}, "float[N,6] x", "float[N,4] y"
    )
    batches = [np.abs(b) for b in small.batches(3, (20, 6))]
    model = prepared(source, batches)
    inputs = [{"x": torch.from_numpy(b)} for b in batches]
    x = torch.from_numpy(np.concatenate(batches))
    weights = {name: model.stored(name).detach().clone() for name in ("v", "w", "c")}
    changed, order = torch.full((6, 5), 0.5), []
    found = readers(weight_matrices(model)[0])[::-1]
    with torch.no_grad():
        for group, *learnt in learn_in_turn(model, found, inputs, progress=False):
            order.append(group[0].value)
            rows, targets = learnt
            if order == ["v"]:
                model.assign("v", changed)
                stub = group[0].stub
                assert not torch.equal(stub(weights["v"]), weights["v"])
                kept = stub(changed)
    assert order == ["v", "w"]
    fed, wanted = (
        (x @ kept).relu().double(),
        (x @ weights["v"]).relu().double() @ weights["w"].double(),
    )
    # Sums of some sixty float32 products.
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(rows.second[0], fed.T @ fed / len(x), **near)
    torch.testing.assert_close(targets.mean[0], wanted.mean(0) + weights["c"].double(), **near)
    spread = (fed - fed.mean(0)).T @ (wanted - wanted.mean(0)) / len(x)
    torch.testing.assert_close(targets.covariance[0], spread, **near)


def test_weights_on_one_tensor_share_a_run_and_dead_branches_are_skipped(small) -> None:
    nodes = "a = MatMul(x, v) b = MatMul(x, w) y = Add(a, b)"
    source = small.build(nodes, {"v": (6, 5), "w": (6, 5)}, "float[N,6] x", "float[N,5] y")
    batches = small.batches(2, (4, 6))
    model, runs = prepared(source, batches), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    found = readers(weight_matrices(model)[0])
    inputs = [{"x": torch.from_numpy(b)} for b in batches]
    with torch.no_grad():
        learnt = list(learn_in_turn(model, found, inputs, progress=False))
    assert len(runs) == len(batches)
    assert learnt[0][1] is learnt[1][1]
    assert learnt[0][1].count == 8
