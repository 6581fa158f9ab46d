"""Calibration by several processes against one process on all their data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qwrap
from qwrap.errors import NotCalibratedError, QwrapError
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.observe.sync import is_distributed, merge_ranks
from qwrap.quant.prepare import stubs

WORLD = 3  # the last one gets no data
Results = dict[str, Any]


@dataclass
class Rank:
    """What a case is run with."""

    number: int
    source: bytes
    batches: list[Any]
    folder: Path


def share(batches: list[Any], rank: int) -> list[Any]:
    """What rank 0 or 1 gets; uneven, so that averages have to be weighted."""
    return [batches[:1], batches[1:], []][rank]


def prepared(source: bytes, **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(source_of(source)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def source_of(source: bytes) -> Any:
    import onnx

    return onnx.load_from_string(source)


def contents(model: qwrap.WrappedModel) -> Results:
    """Every scale and every statistic, and where quantization stayed."""
    assert model.plan is not None
    found: Results = {"roles": {key: node.role for key, node in model.plan.nodes.items()}}
    for point, stub in stubs(model):
        found[f"{point} scale"] = stub.scale.clone()
        found[f"{point} zero point"] = stub.zero_point.clone()
        if stub.observer is not None:
            found[f"{point} seen"] = seen(stub.observer)
    return found


def seen(observer: Observer) -> Results:
    """The statistic in a form that does not tell an absent count from 0."""
    state = observer.get_extra_state()
    left_out = state["left_out"]
    return state | {"left_out": torch.zeros(2, dtype=torch.int64) if left_out is None else left_out}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, save moving averages, which depend on the batches' order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "averages":
                assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# What runs in every rank; processes take seconds to start, so that all cases share three


def run_rank(rank: int, folder: str, source: bytes, branchy: bytes, batches: list[Any]) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=WORLD
    )
    pair = dist.new_group([0, 1])
    results: Results = {"distributed": is_distributed()}
    for name, case in CASES.items():
        results[name] = case(Rank(rank, source, share(batches, rank), path))
    results["branches"] = calibrated(branchy, share(branch_batches(), rank))
    if rank < 2:
        model = prepared(source)
        qwrap.calibrate(model, share(batches, rank), progress=False, group=pair)
        results["two ranks"] = contents(model)
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


def calibrated(source: bytes, batches: list[Any], **settings: object) -> Results:
    model = prepared(source, **settings)
    qwrap.calibrate(model, batches, progress=False)
    return contents(model)


def mse(here: Rank) -> Results:
    return calibrated(here.source, here.batches)


def minmax(here: Rank) -> Results:
    return calibrated(here.source, here.batches, method="minmax")


def wrapped(here: Rank) -> Results:
    """A module inside DistributedDataParallel, run with as many batches by every rank."""
    model = prepared(here.source)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    with qwrap.calibrating(parallel.module), torch.no_grad():
        parallel(torch.full((1, 3, 8, 8), 1.0 + here.number))
    return contents(model)


def channelwise(here: Rank) -> Results:
    observers = [HistogramObserver("h", 1), MinMaxObserver("m", 1), MinMaxObserver("none")]
    for batch in here.batches:
        for observer in observers[:2]:
            observer.observe(special(batch))
    merge_ranks(observers, torch.device("cpu"))
    return {o.name: seen(o) for o in observers}


def special(batch: Any) -> Tensor:
    """The batch with a zero, a mask, NaN and infinity in it, and channels of different width."""
    x = torch.from_numpy(batch).clone()
    x[0, :, 0, 0] = torch.tensor([0.0, -3.4e38, torch.nan])
    x[0, 0, 1, 1] = torch.inf
    return x * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]


def averages(here: Rank) -> Tensor:
    observer = MinMaxObserver("x", ema=0.5)
    for batch in here.batches:
        observer.observe(torch.from_numpy(batch))
    merge_ranks([observer], torch.device("cpu"))
    return observer.ema_high


EARLIER, ALL = "earlier.json", "all.json"


def going_on(here: Rank) -> int:
    """Goes on from what one process saw, and writes what all saw since."""
    model = prepared(here.source)
    files = {"statistics": here.folder / EARLIER, "save": here.folder / ALL}
    qwrap.calibrate(model, here.batches, progress=False, **files)
    return qwrap.Statistics.of(model).batches


def message(case: Callable[[], None]) -> str:
    with pytest.raises(QwrapError) as caught:
        case()
    return f"{caught.type.__name__}: {caught.value}"


def no_data(here: Rank) -> str:
    return message(lambda: qwrap.calibrate(prepared(here.source), [], progress=False))


def other_tensors(here: Rank) -> str:
    observers = [MinMaxObserver(f"tensor of {here.number}")]
    return message(lambda: merge_ranks(observers, torch.device("cpu")))


def other_channels(here: Rank) -> str:
    observer = MinMaxObserver("x", 0)
    observer.observe(torch.ones(4 + here.number))
    return message(lambda: merge_ranks([observer], torch.device("cpu")))


CASES = {
    "mse": mse,
    "minmax": minmax,
    "wrapped": wrapped,
    "channelwise": channelwise,
    "averages": averages,
    "going on": going_on,
    "no data": no_data,
    "other tensors": other_tensors,
    "other channels": other_channels,
}


def branch_batches() -> list[np.ndarray]:
    """Rank 0 reaches one branch, rank 1 the other."""
    rng = np.random.default_rng(3)
    return [rng.uniform(*ends, (1, 3, 8, 8)).astype(np.float32) for ends in ((-2, 0), (0, 1))]


@pytest.fixture(scope="module")
def sources(small) -> tuple[bytes, bytes]:
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, u) }> "
        "y = Relu(r)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1)}
    branchy = small.build(nodes, weights | {"z": np.array(0, np.float32)})
    return small.convs().SerializeToString(), branchy.SerializeToString()


@pytest.fixture(scope="module")
def ranks(sources, small, tmp_path_factory) -> list[Results]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    earlier = prepared(sources[0])
    qwrap.calibrate(earlier, earlier_batches(small), save=folder / EARLIER, progress=False)
    arguments = (str(folder), *sources, small.batches(3))
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=WORLD)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    results[0]["file"] = folder / ALL
    return results


def earlier_batches(small) -> list[np.ndarray]:
    return small.batches(2, seed=7)


def test_one_process_is_not_distributed(ranks) -> None:
    assert not is_distributed()
    assert all(result["distributed"] for result in ranks)


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_three_ranks_one_without_data_get_what_one_process_gets(
    ranks, sources, small, method: str
) -> None:
    expected = calibrated(sources[0], small.batches(3), method=method)
    for result in ranks:
        assert_same(result[method], expected)


def test_two_ranks_of_a_group_get_what_one_process_gets(ranks, sources, small) -> None:
    expected = calibrated(sources[0], small.batches(3))
    for result in ranks[:2]:
        assert_same(result["two ranks"], expected)
    assert "two ranks" not in ranks[2]


def test_a_branch_that_one_rank_reaches_is_quantized_on_all(ranks, sources) -> None:
    expected = calibrated(sources[1], branch_batches())
    assert {expected["roles"][key] for key in ("/p", "/q")} == {"integer"}
    alone = calibrated(sources[1], branch_batches()[:1])
    assert alone["roles"]["/p"] == "float"
    for result in ranks:
        assert_same(result["branches"], expected)


def test_a_module_inside_distributed_data_parallel_is_calibrated(ranks, sources) -> None:
    batches = [np.full((1, 3, 8, 8), 1 + rank, np.float32) for rank in range(WORLD)]
    expected = calibrated(sources[0], batches)
    for result in ranks:
        assert_same(result["wrapped"], expected)


def test_channels_masks_and_missing_tensors_merge_exactly(ranks, small) -> None:
    observers = {"h": HistogramObserver("h", 1), "m": MinMaxObserver("m", 1)}
    for batch in small.batches(3):
        for observer in observers.values():
            observer.observe(special(batch))
    for result in ranks:
        assert_same(
            {k: result["channelwise"][k] for k in observers},
            {name: seen(observer) for name, observer in observers.items()},
        )
        assert_same(result["channelwise"]["none"], seen(MinMaxObserver("none")))


def test_moving_averages_count_with_the_batches_behind_them(ranks, small) -> None:
    first, second, third = (float(batch.max()) for batch in small.batches(3))
    expected = (first + 2 * (second + third) / 2) / 3  # of ranks 0 and 1, at ema=0.5
    for result in ranks:
        assert result["averages"].item() == pytest.approx(expected, rel=1e-6)  # float32


def test_earlier_statistics_count_once_and_one_file_holds_what_all_ranks_saw(
    ranks, sources, small
) -> None:
    model = prepared(sources[0])
    batches = [*earlier_batches(small), *small.batches(3)]
    qwrap.calibrate(model, batches, progress=False)
    expected, found = qwrap.Statistics.of(model), qwrap.Statistics.load(ranks[0]["file"])
    assert [result["going on"] for result in ranks] == [found.batches] * WORLD == [5] * WORLD
    assert found.fingerprint == expected.fingerprint
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].count == tensor.count
        assert torch.equal(found.tensors[name].extremes, tensor.extremes)
        assert torch.equal(found.tensors[name].counts, tensor.counts)


def test_errors_come_on_every_rank(ranks) -> None:
    for result in ranks:
        assert result["no data"].startswith(f"{NotCalibratedError.__name__}: no data ran through")
        assert result["other tensors"].startswith("ConfigError: the ranks observe different")
        assert (
            "InputError: tensor 'x': 4 channels along axis 0 on one rank, 6 on another"
            in (result["other channels"])
        )
