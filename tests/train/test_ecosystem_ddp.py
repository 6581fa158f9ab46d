"""DistributedDataParallel by two processes against one process on all their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import qwrap
from qwrap.model.extra_state import SUFFIX
from qwrap.quant.prepare import stubs
from qwrap.train.schedule import fake_quant, freeze_observers

WORLD = 2
WAYS = ("fixed", "follow", "lsq", "lsq+", "pact")
Results = dict[str, Any]


def data() -> list[Tensor]:
    """Batches whose halves have ranges of their own."""
    rng = np.random.default_rng(1)
    batches = rng.normal(0, 1, (5, 4, 3, 8, 8)).astype(np.float32)
    batches[:, 2:] *= 1.5
    return list(torch.from_numpy(batches))


def share(batch: Tensor) -> Tensor:
    return batch.chunk(WORLD)[dist.get_rank()] if dist.is_initialized() else batch


def switched(model: qwrap.WrappedModel, step: int) -> None:
    """One step in float, and one with ranges that stay."""
    fake_quant(model, step != 1)
    if step >= 3:
        freeze_observers(model, step == 3)


def trained(source: bytes, wrap: Callable[..., torch.nn.Module], way: str, file: Path) -> Results:
    """Calibrate, train and export."""
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", training=way))
    # Moving averages, at which "follow" starts, are not those of the whole batches.
    batches = data() if way == "follow" else [share(batch) for batch in data()]
    qwrap.calibrate(model, batches, progress=False)
    parallel = wrap(model.train())
    groups = qwrap.param_groups(model, lr=0.01, scale_lr=2e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for step, batch in enumerate(data()):
        switched(model, step)
        optimizer.zero_grad()
        x = share(batch)
        (parallel(x) - x.mean((1, 2, 3), keepdim=True)).square().mean().backward()
        optimizer.step()
    if not dist.is_initialized() or dist.get_rank() == 0:
        qwrap.export(model, file)
    scales = {str(point): (stub.scale, stub.zero_point) for point, stub in stubs(model)}
    state = model.state_dict()
    state = {name: value for name, value in state.items() if not name.endswith(SUFFIX)}
    return {"state": state, "scales": scales, "file": file}


def run_rank(rank: int, folder: str, source: bytes) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    meeting = f"file://{path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    results = {
        way: trained(source, DistributedDataParallel, way, path / f"{way}.onnx") for way in WAYS
    }
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def source(small) -> bytes:
    return small.convs().SerializeToString()


@pytest.fixture(scope="module")
def ranks(source, tmp_path_factory) -> list[Results]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder), source), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_hold_the_same(ranks, way: str) -> None:
    first, second = (result[way] for result in ranks)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for name, (scale, zero_point) in first["scales"].items():
        assert torch.equal(scale, second["scales"][name][0]), name
        assert torch.equal(zero_point, second["scales"][name][1]), name


@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_one_process(ranks, source, small, tmp_path, way: str) -> None:
    """Up to the order of float32 sums, of gradients of order 1, over five steps."""
    expected, found = (
        trained(source, lambda model: model, way, tmp_path / "one.onnx"),
        ranks[0][way],
    )
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=2e-6)
    for name, (scale, zero_point) in expected["scales"].items():
        torch.testing.assert_close(found["scales"][name][0], scale, rtol=1e-5, atol=0)
        assert torch.equal(found["scales"][name][1], zero_point), name
    x = small.batches(1, seed=3)[0]
    results = [small.run(result["file"], x)[0] for result in (found, expected)]
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("way", ["lsq", "lsq+"])
def test_scales_were_learned(ranks, way: str) -> None:
    state = ranks[0][way]["state"]
    gains = {name: value for name, value in state.items() if name.endswith((".gain", ".shift"))}
    assert len(gains) == {"lsq": 4, "lsq+": 5}[way]  # not of the output
    assert all(value.any() for name, value in gains.items() if name.endswith("gain"))
