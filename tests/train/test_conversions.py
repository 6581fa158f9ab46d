"""Training through tensors that some of their readers get in another type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qwrap
from qwrap.quant.prepare import stub_at
from qwrap.train import Schedule, fake_quant, freeze_observers, learn_scales, learn_zero_points

NODES = (
    "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2) "
    "z = Conv<pads=[1,1,1,1]>(b, w3) c = Add(y, z) u = Mul(b, b)"
)
WEIGHTS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "b2": (6,), "w3": (6, 6, 3, 3)}
WORLD = 2


@pytest.fixture(scope="module")
def source(small: Any) -> onnx.ModelProto:
    return small.build(NODES, WEIGHTS, outputs="float[N,6,8,8] c, float[N,6,8,8] u", opset=21)


def mixed(source: onnx.ModelProto, way: str) -> qwrap.WrappedModel:
    """Three nodes in 16 bit behind one of 8 bits, two of which read what they share."""
    config = qwrap.QConfig(scope="all", training=way)
    config.set(["/y", "/z", "/c"], activation="uint16")
    model = qwrap.load(source)
    qwrap.prepare(model, config)
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float32) for _ in range(2)]
    qwrap.calibrate(model, batches, progress=False)
    return model


def conversion_of(model: qwrap.WrappedModel) -> Any:
    return stub_at(model, model.plan.point_of("b_convert"))


def test_every_parameter_is_in_one_group(source: onnx.ModelProto) -> None:
    model = mixed(source, "lsq+")
    groups = {group["name"]: group["params"] for group in qwrap.param_groups(model)}
    found = [id(parameter) for members in groups.values() for parameter in members]
    assert len(found) == len(set(found)) == len([*model.parameters()])
    own = conversion_of(model).trained()
    assert sum(p is own["scale"] for p in groups["scales"]) == 1
    assert sum(p is own["zero_point"] for p in groups["zero_points"]) == 1


def test_verbs_mean_a_conversion_once_by_its_name(source: onnx.ModelProto) -> None:
    model, name = mixed(source, "lsq+"), "b_convert"
    stub, x = conversion_of(model), torch.randn(2, 3, 8, 8)
    assert learn_zero_points(model, False, tensors=name) == 1
    assert learn_scales(model, False, tensors=name) == 1
    sum(o.square().sum() for o in model(x)).backward()
    assert all(not p.grad.any() for p in stub.trained().values())
    assert stub_at(model, model.plan.point_of("b")).trained()["scale"].grad.any()
    assert learn_scales(model, tensors=name) == 1
    model.zero_grad()
    sum(o.square().sum() for o in model(x)).backward()
    assert stub.trained()["scale"].grad.any()
    assert fake_quant(model, False, tensors=name) == 1
    with torch.no_grad():
        values = torch.rand(5)
        assert torch.equal(stub(values), values)


def test_a_schedule_takes_conversions_along(source: onnx.ModelProto) -> None:
    model = mixed(source, "lsq")
    stub = conversion_of(model)
    schedule = Schedule(model, 4, fake_quant=1, learn_scales=2)
    states = []
    for _ in range(3):
        states.append((stub.mode, stub.learning))
        schedule.step()
    assert states == [("float", False), ("quantize", False), ("quantize", True)]


def test_conversions_stop_following_when_asked(source: onnx.ModelProto) -> None:
    model = mixed(source, "follow").train()
    stub, x = conversion_of(model), 4 * torch.randn(2, 3, 8, 8)
    before = stub.scale.clone()
    assert freeze_observers(model, tensors="b*") == 2  # the tensor too
    model(x)
    assert torch.equal(stub.scale, before)
    freeze_observers(model, False)
    model(x)
    assert not torch.equal(stub.scale, before)


def test_finetuning_teaches_conversions(source: onnx.ModelProto, small: Any) -> None:
    model = mixed(source, "lsq")
    before = conversion_of(model).scale.clone()
    qwrap.finetune(model, small.batches(4), steps=4, progress=False)
    assert not torch.equal(conversion_of(model).scale, before)


# --- several processes ---------------------------------------------------------------------------


def trained(model: qwrap.WrappedModel, wrapped: torch.nn.Module, part: slice) -> dict[str, Any]:
    optimizer = torch.optim.SGD(qwrap.param_groups(model.train(), lr=0.01, scale_lr=1e-4))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8, generator=generator)[part]
        optimizer.zero_grad()
        sum(o.square().mean() for o in wrapped(x)).backward()
        optimizer.step()
    keys = model.plan.scales()
    return {key: stub_at(model, model.plan.point_of(key)).scale.clone() for key in keys}


def run_rank(rank: int, folder: str, source: bytes) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder) / 'meeting'}"
    model = mixed(onnx.load_from_string(source), "lsq")  # all ranks see the same data
    follower = mixed(onnx.load_from_string(source), "follow")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    part = slice(2 * rank, 2 * rank + 2)
    found = {
        way: trained(m, DistributedDataParallel(m), part)
        for way, m in (("lsq", model), ("follow", follower))
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_conversions_as_one_does(
    source: onnx.ModelProto, tmp_path: Path
) -> None:
    data = source.SerializeToString()
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), data), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for way in ("lsq", "follow"):
        model = mixed(source, way)
        alone = trained(model, model, slice(None))
        assert "b_convert" in alone
        for key, scale in alone.items():
            assert torch.equal(ranks[0][way][key], ranks[1][way][key])
            # gradients of order 1 are summed in another order
            torch.testing.assert_close(ranks[0][way][key], scale, rtol=1e-5, atol=0)
