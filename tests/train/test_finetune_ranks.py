"""Fine-tuning by two processes against one process on all their data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist

import qwrap

WORLD = 2
Results = dict[str, Any]

# Plain descent, so that the parameters after one step tell the gradient.
descend = functools.partial(
    qwrap.finetune,
    steps=1,
    optimizer=torch.optim.SGD,
    lr=0.1,
    scale_lr=0.1,
    weight_scale_lr=0.1,
    held_out=0,
    progress=False,
)


def calibrated(source: bytes, batches: list[np.ndarray], **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(onnx.load_from_string(source))
    settings = {"scope": "kernels", "weight": "int4", **settings}
    qwrap.prepare(model, qwrap.QConfig(**settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def share(batches: list[np.ndarray], rank: int) -> list[np.ndarray]:
    return batches[rank::WORLD]


def run_rank(rank: int, folder: str, source: bytes, batches: list[np.ndarray]) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    meeting = f"file://{path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    own = share(batches, rank)
    results = {
        "one step": one_step(calibrated(source, own), own),
        "held out": held_out(calibrated(source, own), own),
        "following": following(calibrated(source, own, training="follow"), own),
        "iterators": iterators(calibrated(source, own), own[: 3 + rank]),
        "wrapped": wrapped(calibrated(source, own), own),
        "live": live(calibrated(source, own, bn="live"), own),
    }
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


def one_step(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> Results:
    """The second rank starts from other weights, which have to give way."""
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.w1.add_(1)
    descend(model, batches[:1])
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def held_out(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> Results:
    report = qwrap.finetune(
        model, batches[2:], held_out=batches[:2], steps=10, evaluate=2, lr=1e-4, progress=False
    )
    losses = [record.held_out for record in report.history]
    return {"losses": losses, "best": report.best_step, "state": parameters(model)}


def following(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> Results:
    """Each rank's activations widen the ranges it sees."""
    wide = [batch * (1 + dist.get_rank()) for batch in batches]
    qwrap.finetune(model, wide, held_out=0, steps=4, lr=1e-4, progress=False)
    return parameters(model) | {name: b.clone() for name, b in model.named_buffers()}


def iterators(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> int:
    """One rank has a batch less."""
    return descend(model, iter(batches), steps=10).history[-1].step


def live(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> Results:
    """Each rank normalizes batches of its own."""
    qwrap.finetune(model, batches[2:], held_out=batches[:2], steps=3, evaluate=1, progress=False)
    assert model.replaced
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def wrapped(model: qwrap.WrappedModel, batches: list[np.ndarray]) -> Results:
    """A loop of one's own around DistributedDataParallel."""
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(qwrap.param_groups(model), lr=0.1)
    with qwrap.Distillation(model) as distillation:
        parallel(torch.from_numpy(batches[0]))
        distillation.loss().total.backward()
        optimizer.step()
    return parameters(model)


def parameters(model: qwrap.WrappedModel) -> Results:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def data(small) -> list[np.ndarray]:
    return small.batches(10, (4, 3, 8, 8))


@pytest.fixture(scope="module")
def source(small) -> bytes:
    return small.convs().SerializeToString()


@pytest.fixture(scope="module")
def ranks(source, data, tmp_path_factory) -> list[Results]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder), source, data), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_equal(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("case", ["one step", "wrapped"])
def test_two_ranks_take_the_step_of_one_process_with_both_batches(
    ranks, source, data, case: str
) -> None:
    assert_equal(ranks[0][case], ranks[1][case])
    model = calibrated(source, data)
    descend(model, data[:2], accumulate=2)
    for name, expected in parameters(model).items():
        found = ranks[0][case][name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # sums in another order


def test_all_ranks_keep_the_same_state(ranks) -> None:
    assert ranks[0]["held out"]["losses"] == ranks[1]["held out"]["losses"]
    assert ranks[0]["held out"]["best"] == ranks[1]["held out"]["best"] > 0
    assert_equal(ranks[0]["held out"]["state"], ranks[1]["held out"]["state"])


def test_scales_that_follow_the_data_end_the_same_on_all_ranks(ranks) -> None:
    assert_equal(ranks[0]["following"], ranks[1]["following"])


def test_all_ranks_have_the_same_statistics_of_live_normalizations(ranks) -> None:
    assert len(ranks[0]["live"]) == 2
    assert_equal(ranks[0]["live"], ranks[1]["live"])


def test_the_held_out_loss_is_that_of_all_ranks_data(ranks, source, data) -> None:
    model = calibrated(source, data)
    with torch.no_grad(), qwrap.Distillation(model, blocks=None) as distillation:
        losses = [distillation(batch).total.item() for batch in data[:4]]
    assert ranks[0]["held out"]["losses"][0] == pytest.approx(np.mean(losses), rel=1e-6)


def test_training_ends_where_one_rank_has_no_more(ranks) -> None:
    assert [found["iterators"] for found in ranks] == [3, 3]
