"""FSDP2 by two processes, a shard group for each Block, against one process on all their data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import qwrap
from qwrap.errors import ModelError
from qwrap.model.block import Block
from qwrap.model.extra_state import SUFFIX
from qwrap.quant.prepare import stubs

WORLD = 2
WAYS = ("follow", "lsq", "lsq+", "pact")
Results = dict[str, Any]


def data() -> list[Tensor]:
    rng = np.random.default_rng(1)
    return list(torch.from_numpy(rng.normal(0, 1, (4, 4, 3, 8, 8)).astype(np.float32)))


def share(batch: Tensor) -> Tensor:
    return batch.chunk(WORLD)[dist.get_rank()] if dist.is_initialized() else batch


def prepared(source: bytes, way: str) -> qwrap.WrappedModel:
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", training=way))
    return model


def sharded(model: qwrap.WrappedModel) -> None:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for child in model.children():
        if isinstance(child, Block):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def trained(model: qwrap.WrappedModel) -> Results:
    groups = qwrap.param_groups(model.train(), lr=0.01, scale_lr=2e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for batch in data():
        optimizer.zero_grad()
        x = share(batch)
        (model(x) - x.mean((1, 2, 3), keepdim=True)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(data()[0])  # the same one in every process
    return {"output": output, "scales": scales(model)}


def scales(model: qwrap.WrappedModel) -> Results:
    return {
        str(point): (stub.scale.clone(), stub.zero_point.clone()) for point, stub in stubs(model)
    }


def case(source: bytes, way: str) -> Results:
    model = prepared(source, way)
    qwrap.calibrate(model, data(), progress=False)
    sharded(model)
    results = trained(model)
    return results | {"state": whole_state(model)}


def calibrated_in_shards(source: bytes) -> Results:
    model = prepared(source, "lsq")
    sharded(model)
    qwrap.calibrate(model, [share(batch) for batch in data()], progress=False)
    return scales(model)


def refused(source: bytes, folder: Path) -> list[str]:
    """What one process alone cannot do, and must not wait for the others to do."""
    model = prepared(source, "lsq")
    qwrap.calibrate(model, data(), progress=False)
    sharded(model)
    return [
        message(lambda: qwrap.export(model, folder / "sharded.onnx")),
        message(lambda: qwrap.verify(model, folder / "sharded.onnx", data())),
        message(lambda: qwrap.exact(model).__enter__()),
        message(lambda: qwrap.prepare(model)),
    ]


def message(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    return str(caught.value)


def run_rank(rank: int, folder: str, source: bytes) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    path = Path(folder)
    meeting = f"file://{path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    results: Results = {way: case(source, way) for way in WAYS}
    results["calibrated in shards"] = calibrated_in_shards(source)
    results["refused"] = refused(source, path)
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def source(residual) -> bytes:
    return residual.SerializeToString()


@pytest.fixture(scope="module")
def ranks(source, tmp_path_factory) -> list[Results]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder), source), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def gathered(ranks, source, way: str) -> qwrap.WrappedModel:
    """The first rank's state in a model of one process."""
    model = prepared(source, way)
    model.load_state_dict(ranks[0][way]["state"])
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_first_rank_gathers_the_model_that_all_trained(ranks, source, way: str) -> None:
    model = gathered(ranks, source, way).eval()
    with torch.no_grad():
        output = model(data()[0])
    for result in ranks:
        assert torch.equal(result[way]["output"], output)
        for name, (scale, zero_point) in scales(model).items():
            assert torch.equal(result[way]["scales"][name][0], scale), name
            assert torch.equal(result[way]["scales"][name][1], zero_point), name
    assert not ranks[1][way]["state"]


@pytest.mark.parametrize("way", WAYS)
def test_what_it_exports_is_what_was_trained(ranks, source, tmp_path, way: str) -> None:
    model = gathered(ranks, source, way).eval()
    qwrap.export(model, tmp_path / "gathered.onnx")
    report = qwrap.verify(model, tmp_path / "gathered.onnx", data()[:1], progress=False)
    assert not any(t.differing for t in report.deployed.tensors)


@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_one_process(ranks, source, way: str) -> None:
    """Up to the order of float32 sums, of gradients of order 1, over four steps."""
    model = prepared(source, way)
    qwrap.calibrate(model, data(), progress=False)
    expected = trained(model)
    state = model.state_dict()
    for name, value in ranks[0][way]["state"].items():
        if not name.endswith(SUFFIX):
            torch.testing.assert_close(value, state[name], rtol=1e-5, atol=2e-6)
    for name, (scale, zero_point) in expected["scales"].items():
        torch.testing.assert_close(ranks[0][way]["scales"][name][0], scale, rtol=1e-5, atol=0)
        assert torch.equal(ranks[0][way]["scales"][name][1], zero_point), name
    gains = [value for name, value in state.items() if name.endswith(".gain")]
    assert bool(gains) == (way != "follow")
    assert all(gain.any() for gain in gains)


def test_sharded_parameters_are_calibrated_as_whole_ones(ranks, source) -> None:
    model = prepared(source, "lsq")
    qwrap.calibrate(model, data(), progress=False)
    for name, (scale, zero_point) in scales(model).items():
        for result in ranks:
            assert torch.equal(result["calibrated in shards"][name][0], scale), name
            assert torch.equal(result["calibrated in shards"][name][1], zero_point), name


def test_what_needs_the_whole_model_says_how_to_get_it(ranks) -> None:
    for result in ranks:
        for text in result["refused"]:
            assert "parameters are sharded (FSDP); call get_model_state_dict" in text
