"""Statistics over several processes against one process on all their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import torch.distributed as dist
from normed import (
    LIVE,
    batches,
    conv_net,
    seeded,
    to_onnx,
)
from torch import Tensor, nn

import qwrap
from qwrap.model.extra_state import SUFFIX

WORLD = 2


def run_rank(rank: int, folder: str, source: bytes) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    qwrap.calibrate(model, shares(batches())[rank], progress=False)
    qwrap.train.sync_batch_norm(model)
    train_in_parallel(model, rank)
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(SUFFIX)}
    qwrap.train.reestimate_batch_norm(model, shares(batches())[rank], progress=False)
    state |= {f"renewed {k}": v for k, v in model.state_dict().items() if "running" in k}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_in_parallel(model: nn.Module, rank: int) -> None:
    """In a function, for a wrapper that outlives the process group may wait for ever."""
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    steps(parallel, lambda x: shares([x])[rank][0])


def shares(data: list[Tensor]) -> list[list[Tensor]]:
    """Unequal parts of each batch for the ranks."""
    return [[x[:3] for x in data], [x[3:] for x in data]]


def steps(model: nn.Module, part: Callable[[Tensor], Tensor]) -> None:
    """Train on the sum over samples of a loss, so that parts of a batch add up to it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches(2, seed=2):
        optimizer.zero_grad()
        scale = dist.get_world_size() if dist.is_initialized() else 1  # which averages gradients
        (model.train()(part(x)).square().sum() * scale / 32).backward()
        optimizer.step()


def test_two_ranks_with_common_statistics_train_as_one_process(tmp_path: Path) -> None:
    source = to_onnx(seeded(conv_net)).SerializeToString()
    arguments = (str(tmp_path), source)
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    model = qwrap.load(onnx.load_from_string(source))
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    qwrap.calibrate(model, batches(), progress=False)
    steps(model, lambda x: x)
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith(SUFFIX)}
    for name, value in wanted.items():
        if not name.startswith("taps"):  # gains learn from samples, each rank from its own
            # Sums over samples in another order, through rounding that may fall the other way.
            torch.testing.assert_close(first[name], value, rtol=2e-2, atol=2e-3)
    qwrap.train.reestimate_batch_norm(model, batches(), progress=False)
    for name, value in model.state_dict().items():
        if "c0.running" in name:
            torch.testing.assert_close(first[f"renewed {name}"], value, rtol=2e-2, atol=2e-3)
