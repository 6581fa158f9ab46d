import copy
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

import qwrap
from qwrap.errors import ConfigError, ExportError, NotCalibratedError, StatisticsError
from qwrap.model.points import ValuePoint
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[4] / "shared"))
FORMS = ("s.safetensors", "s.json")
PARTS = ("extremes", "averages", "counts", "exponent")
NUMBERS = ("axis", "count", "masked", "nonfinite", "batches", "bins")


def prepared(source, **settings) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def calibrated(source, batches, *, statistics=None, **settings) -> qwrap.WrappedModel:
    model = prepared(source, **settings)
    qwrap.calibrate(model, batches, statistics=statistics, progress=False)
    return model


def observed(source, batches, **settings) -> qwrap.Statistics:
    return qwrap.Statistics.of(calibrated(source, batches, **settings))


def assert_same(a: qwrap.Statistics, b: qwrap.Statistics, averages: float = 0) -> None:
    """Equal bit by bit; ``averages``: how far moving averages may be apart, relative.

    They weigh the order of batches, so that a merge gives others than one calibration.
    """
    assert a.fingerprint == b.fingerprint
    assert a.batches == b.batches
    assert a.tensors.keys() == b.tensors.keys()
    for name, mine in a.tensors.items():
        theirs = b.tensors[name]
        for key in NUMBERS:
            assert getattr(mine, key) == getattr(theirs, key), (name, key)
        for key in PARTS:
            x, y = getattr(mine, key), getattr(theirs, key)
            if x is None or y is None:
                assert x is y, (name, key)
            elif key == "averages" and averages:
                torch.testing.assert_close(x, y, rtol=averages, atol=0)
            else:
                assert x.dtype == y.dtype
                assert torch.equal(x, y), (name, key)


def assert_same_scales(a: qwrap.WrappedModel, b: qwrap.WrappedModel) -> None:
    assert a.attached.keys() == b.attached.keys()
    for point in a.attached:
        assert torch.equal(a.tap(point).scale, b.tap(point).scale), point


# --- what it holds


def test_it_holds_what_numpy_finds_in_the_input(small) -> None:
    batches = small.batches()
    statistics = observed(small.convs(), batches)
    everything, found = np.concatenate(batches), statistics.tensors["x"]
    assert statistics.batches == found.batches == 3
    assert (found.count, found.masked, found.nonfinite) == (everything.size, 0, 0)
    assert (float(found.low), float(found.high)) == (everything.min(), everything.max())
    edges = np.arange(-found.bins, found.bins + 1) * 2.0 ** int(found.exponent) / found.bins
    expected, _ = np.histogram(everything, edges)
    np.testing.assert_array_equal(found.counts[0, :-1], expected)


def test_without_data_there_is_nothing_to_hold(small) -> None:
    with pytest.raises(NotCalibratedError, match="no data ran through the model"):
        qwrap.Statistics.of(prepared(small.convs()))
    with pytest.raises(ConfigError, match="not prepared"):
        qwrap.Statistics.of(qwrap.load(small.convs()))


def test_a_state_dict_carries_the_statistics(small) -> None:
    model = calibrated(masked(small), small.batches())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = prepared(masked(small))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(qwrap.Statistics.of(model), qwrap.Statistics.of(other))
    assert_same(qwrap.Statistics.of(model), qwrap.Statistics.of(copy.deepcopy(model)))


def test_batches_run_in_the_users_own_loop_are_counted(small) -> None:
    model = prepared(small.convs())
    with qwrap.calibrating(model):
        for batch in small.batches():
            model(torch.from_numpy(batch))
        halfway = qwrap.Statistics.of(model)
    assert halfway.batches == 3
    assert_same(halfway, qwrap.Statistics.of(model))


# --- files


def masked(small) -> onnx.ModelProto:
    """A model whose Add and Softmax calibration returns to float, because b holds masks."""
    mask = np.where(np.arange(8) < 2, -3.4e38, 0).astype(np.float32)
    nodes = "a = Conv(x, w) b = Add(a, m) c = Softmax<axis=3>(b) y = Conv(c, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "m": mask}
    return small.build(nodes, weights)


def overflowing(small) -> onnx.ModelProto:
    """A model whose tensor d is infinite where the input is not tiny."""
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "z": np.full(1, 1e-38, np.float32)}
    return small.build("a = Conv(x, w) d = Div(a, z) y = Conv(d, v)", weights)


def every_kind(small) -> qwrap.Statistics:
    """Statistics with channels, one of them empty, an unseen tensor, -0 and large counts."""
    statistics = observed(masked(small), small.batches())
    of_channels, unseen, plain = (
        HistogramObserver("x", axis=1),
        HistogramObserver("x"),
        MinMaxObserver("x"),
    )
    batch = torch.from_numpy(small.batches()[0])
    batch[:, 1] = torch.nan
    of_channels.observe(batch)
    plain.observe(torch.tensor([-0.0, 1e-42, 65504]))
    large = HistogramObserver("x")
    large.observe(torch.ones(3))
    large.histogram.counts *= 2**40
    kind = type(statistics.tensors["x"])
    extra = {"x": of_channels, "a": unseen, "c": plain, "y": large}
    tensors = {**statistics.tensors, **{k: kind.of(o) for k, o in extra.items()}}
    return qwrap.Statistics(batches=3, fingerprint=statistics.fingerprint, tensors=tensors)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_holds_everything_bit_by_bit(small, tmp_path: Path, name: str) -> None:
    statistics = every_kind(small)
    statistics.save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert_same(qwrap.Statistics.load(tmp_path / name), statistics)
    assert_same(qwrap.Statistics.load(str(tmp_path / name)), statistics)


def test_the_form_is_told_by_the_content(small, tmp_path: Path) -> None:
    statistics = observed(small.convs(), small.batches())
    for name in FORMS:
        statistics.save(tmp_path / name)
        (tmp_path / name).rename(tmp_path / "renamed")
        assert_same(qwrap.Statistics.load(tmp_path / "renamed"), statistics)


def test_a_file_is_small(small, tmp_path: Path) -> None:
    statistics = observed(small.convs(), small.batches())
    for name in FORMS:
        statistics.save(tmp_path / name)
        # 4097 counts of 4 bytes; in text the bins in use, of some 3 characters each.
        assert (tmp_path / name).stat().st_size < 17_000 * len(statistics.tensors) + 4000


def test_json_is_plain_and_portable(small, tmp_path: Path) -> None:
    statistics = observed(small.convs(), small.batches())
    statistics.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    entry = next(e for e in content["tensors"] if e["name"] == "x")
    (row,) = entry["histogram"]
    assert sum(row["counts"]) == entry["count"] == 3 * 384
    assert entry["extremes"] == [
        [float(statistics.tensors["x"].low)],
        [float(statistics.tensors["x"].high)],
    ]


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_cannot_be_written_is_said(small, tmp_path: Path, name: str) -> None:
    statistics = observed(small.convs(), small.batches())
    with pytest.raises(ExportError, match="does not exist; make it first"):
        statistics.save(tmp_path / "no" / name)
    (tmp_path / name).mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        statistics.save(tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ruined",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def saved_by_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, path)


def another_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"format": "pt"})


def declared(size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header = json.dumps({
            "x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        })
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 16)

    return write


FOREIGN = {
    "pickle": (pickled, "is neither a safetensors nor a JSON file"),
    "torch": (saved_by_torch, "is neither a safetensors nor a JSON file"),
    "another safetensors": (another_safetensors, "holds no statistics of qwrap"),
    "huge header": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{" * 99), "is neither"),
    "huge tensor": (declared(2**50), "is damaged"),
    "other JSON": (lambda p: p.write_text('{"tensors": []}'), "holds no statistics of qwrap"),
    "list": (lambda p: p.write_text("[1]"), "holds no statistics of qwrap"),
    "nested": (lambda p: p.write_text("[" * 100_000), "is neither a safetensors nor a JSON file"),
    "text": (lambda p: p.write_text("hello"), "is neither a safetensors nor a JSON file"),
    "empty": (lambda p: p.write_bytes(b""), "is neither a safetensors nor a JSON file"),
    "binary": (lambda p: p.write_bytes(bytes(range(256))), "is neither"),
    "folder": (Path.mkdir, "cannot be read: Is a directory"),
    "missing": (lambda _: None, "cannot be read: No such file"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_file_is_refused_and_never_run(tmp_path: Path, case: str, monkeypatch) -> None:
    write, message = FOREIGN[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file")
    with pytest.raises(StatisticsError, match=f"file: {message}"):
        qwrap.Statistics.load(tmp_path / "file")
    assert not (tmp_path / "ruined").exists()


@pytest.mark.parametrize("name", FORMS)
def test_a_file_cut_off_anywhere_is_refused(small, tmp_path: Path, name: str) -> None:
    observed(small.convs(), small.batches()).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for size in (*range(40), *range(40, len(data) - 1, len(data) // 50), len(data) - 2):
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(StatisticsError, match=name):
            qwrap.Statistics.load(tmp_path / name)


def set_entry(**changes):
    def change(content: dict) -> None:
        content["tensors"][0] |= changes

    return change


def set_row(**changes):
    def change(content: dict) -> None:
        content["tensors"][0]["histogram"][0] |= changes

    return change


def set_header(**changes):
    return lambda content: content.update(changes)


WRONG = {
    "version": (set_header(version=2), "was written by a later qwrap .version 2 of the form"),
    "no version": (set_header(version=None), "version is None"),
    "fingerprint": (set_header(fingerprint={}), "the fingerprint of its model is damaged"),
    "batches": (set_header(batches=-1), "batches is -1"),
    "no tensors": (set_header(tensors=None), "no list of tensors"),
    "no entry": (set_header(tensors=[1]), "has the name None"),
    "names": (lambda c: c["tensors"].append(c["tensors"][0]), "has the name 'x', or two have"),
    "count": (set_entry(count="7"), "count of 'x' is '7'"),
    "long count": (set_entry(count=10**400), r"count of 'x' is 10+…"),
    "half": (set_entry(masked=0.5), "masked of 'x' is 0.5"),
    "no values": (set_entry(count=0), "0 values in 3 batches"),
    "axis": (set_entry(axis=1000), "has the axis 1000"),
    "NaN": (set_entry(extremes=[[float("nan")], [1]]), "NaN is no number"),
    "infinity": (set_entry(extremes=[[-1], [1e300]]), "a range is NaN or infinite"),
    "half known": (set_entry(extremes=[[None], [1]]), "a range is NaN or infinite"),
    "order": (set_entry(extremes=[[2], [-2]]), "low end is above its high end"),
    "channels": (set_entry(extremes=[[1, 2], [3, 4]]), "not one range, average and histogram"),
    "shape": (set_entry(extremes=[[1]]), "a range that is not two lists"),
    "kind": (set_entry(averages=[["1"], [2]]), "a range that is not two lists"),
    "number": (set_entry(averages=[[10**400], [2]]), "a range that no type of numbers holds"),
    "bins": (set_entry(bins=1000), "has histograms of 1000 bins"),
    "many bins": (set_entry(bins=2**40), "has histograms of 1099511627776 bins"),
    "no bins": (set_entry(bins=None), "has 1 histograms of None bins"),
    "no rows": (set_entry(histogram=[]), "its histogram is missing"),
    "row": (set_entry(histogram=[7]), "a histogram without counts"),
    "start": (set_row(start=4090), "a histogram of more than 4096 bins"),
    "counts": (set_row(counts=[1, "2"]), "counts that are no integers"),
    "long counts": (set_row(counts=[2**70]), "counts beyond 64 bits"),
    "many counts": (set_row(counts=[2**62] * 9), "counts are too large"),
    "negative": (set_row(counts=[-1]), "counts contradict each other"),
    "zeros": (set_row(zeros=10**9), "counts contradict each other"),
    "exponent": (set_row(exponent=500), "exponent is no float32's"),
    "long exponent": (set_row(exponent=2**40), "a histogram of exponent 1099511627776"),
    "narrow": (set_row(exponent=-50), "does not cover its range"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_json_is_refused_with_what_is_wrong(small, tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    observed(small.convs(), small.batches()).save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    content["tensors"].sort(key=lambda entry: entry["name"] != "x")
    change(content)
    (tmp_path / "s.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StatisticsError, match=rf"s\.json: .*{message}"):
        qwrap.Statistics.load(tmp_path / "s.json")


def test_a_little_text_cannot_ask_for_much_memory(small, tmp_path: Path) -> None:
    observed(small.convs(), small.batches()).save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    row = {"exponent": 0, "start": 0, "counts": [], "zeros": 0}
    rows = 2**33 // (8 * 2**17)
    content["tensors"][0] |= {
        "axis": 1, "bins": 2**16, "histogram": [row] * rows,
        "extremes": [[0] * rows] * 2, "averages": [[0] * rows] * 2,
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StatisticsError, match="8192 histograms of 65536 bins"):
        qwrap.Statistics.load(tmp_path / "s.json")


PACKED = {
    "missing": (lambda t, _: t.pop("averages"), "it has no averages of torch.float64"),
    "type": (lambda t, _: t.update(averages=t["averages"].float()), "it has no averages of"),
    "shape": (lambda t, _: t.update(extremes=t["extremes"][:, None]), "it has no extremes of"),
    "no shape": (lambda t, _: t.update(x=torch.tensor(1)), "a tensor has no dimension"),
    "left": (lambda t, _: t.update(x=torch.zeros(1)), "ranges or histograms of no tensor"),
    "few": (lambda _, c: c["tensors"][0].update(channels=2**40), "extremes has too few rows"),
    "rows": (lambda _, c: c["tensors"][0].update(rows=2), "has 2 histograms"),
    "bins": (lambda _, c: c["tensors"][0].update(bins=4), r"it has no counts.4 of torch.int64"),
    "NaN": (lambda t, _: t["extremes"].fill_(torch.nan), "a range is NaN or infinite"),
}


@pytest.mark.parametrize("case", PACKED)
def test_wrong_tensors_are_refused_with_what_is_wrong(small, tmp_path: Path, case: str) -> None:
    change, message = PACKED[case]
    path = tmp_path / "s.safetensors"
    observed(small.convs(), small.batches()).save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    content = json.loads(metadata["content"])
    change(tensors, content)
    metadata["content"] = json.dumps(content)
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    with pytest.raises(StatisticsError, match=rf"s\.safetensors: is damaged: .*{message}"):
        qwrap.Statistics.load(path)


# --- merging


def test_a_merge_equals_one_calibration_on_all_data(small) -> None:
    batches = small.batches(6)
    batches[3] *= 100  # ranges and exponents differ between the parts
    parts = [observed(small.convs(), batches[i : i + 2]) for i in (0, 2, 4)]
    whole = observed(small.convs(), batches)
    merged = parts[0].merge(*parts[1:])
    for name, tensor in whole.tensors.items():  # averages weigh the order of batches; see below
        assert torch.equal(tensor.counts, merged.tensors[name].counts)
        assert torch.equal(tensor.extremes, merged.tensors[name].extremes)
        assert tensor.count == merged.tensors[name].count
    assert merged.batches == 6


def test_merging_is_commutative_and_associative(small) -> None:
    a, b, c = (observed(small.convs(), small.batches(n, seed=n)) for n in (1, 2, 3))
    for other in (c.merge(b, a), a.merge(b).merge(c), a.merge(b.merge(c)), b.merge(c).merge(a)):
        assert_same(a.merge(b, c), other, averages=1e-12)  # averages: float64 rounding
    averages = [s.tensors["x"].averages for s in (a, b, c)]
    expected = (averages[0] + 2 * averages[1] + 3 * averages[2]) / 6
    torch.testing.assert_close(a.merge(b, c).tensors["x"].averages, expected)


def test_merging_changes_none_of_its_parts(small) -> None:
    a, b = (observed(small.convs(), small.batches(seed=n)) for n in (1, 2))
    before = copy.deepcopy(a), copy.deepcopy(b)
    a.merge(b)
    assert_same(a, before[0])
    assert_same(b, before[1])
    assert_same(a.merge(), a)


def test_merged_statistics_give_the_scales_of_all_data(small) -> None:
    batches = small.batches(4)
    parts = [observed(small.convs(), part) for part in (batches[:1], batches[1:])]
    model = calibrated(small.convs(), (), statistics=parts[1].merge(parts[0]))
    assert_same_scales(model, calibrated(small.convs(), batches))


def test_what_cannot_be_merged_is_said(small) -> None:
    a = observed(small.convs(), small.batches())
    other = small.convs()
    other.graph.initializer[0].raw_data = b"\0" * len(other.graph.initializer[0].raw_data)
    with pytest.raises(StatisticsError, match=r"two models: weights w1 \(1 of 4\) differ"):
        a.merge(observed(other, small.batches()))
    with pytest.raises(StatisticsError, match="cannot merge: tensor 'x' is in one of the two only"):
        a.merge(observed(small.convs(), small.batches(), excluded=["/a"]))
    with pytest.raises(
        StatisticsError, match=r"tensor '\w': cannot merge MinMaxObserver into Hist"
    ):
        a.merge(observed(small.convs(), small.batches(), method="minmax"))


# --- going on


@pytest.mark.parametrize("method", ["mse", "minmax", "ema", "percentile"])
@pytest.mark.parametrize("name", FORMS)
def test_going_on_from_a_file_equals_one_go(small, tmp_path: Path, name: str, method: str) -> None:
    batches = small.batches(5)
    observed(small.convs(), batches[:2], method=method).save(tmp_path / name)
    model = calibrated(small.convs(), batches[2:], statistics=tmp_path / name, method=method)
    whole = calibrated(small.convs(), batches, method=method)
    assert_same(qwrap.Statistics.of(model), qwrap.Statistics.of(whole))
    assert_same_scales(model, whole)


def test_scales_come_from_a_file_alone(small, tmp_path: Path) -> None:
    whole = calibrated(small.convs(), small.batches())
    qwrap.Statistics.of(whole).save(tmp_path / "s")
    assert_same_scales(calibrated(small.convs(), [], statistics=tmp_path / "s"), whole)
    model = prepared(small.convs())
    with qwrap.calibrating(model, statistics=tmp_path / "s"):
        pass
    assert_same_scales(model, whole)


def test_another_method_needs_no_data(small) -> None:
    statistics = observed(small.convs(), small.batches(), method="mse")
    for method in ("minmax", "percentile", "ema", "l1", "cosine", "entropy", "distribution"):
        expected = calibrated(small.convs(), small.batches(), method=method)
        model = calibrated(small.convs(), (), statistics=statistics, method=method)
        assert_same_scales(model, expected)
        assert_same(qwrap.Statistics.of(model), statistics)  # the histograms are still there


def test_a_method_that_needs_a_histogram_is_refused_without_one(small) -> None:
    statistics = observed(small.convs(), small.batches(), method="minmax")
    with pytest.raises(StatisticsError, match=r"tensor '\w': the statistics have no histogram"):
        calibrated(small.convs(), (), statistics=statistics, method="mse")


def test_fewer_tensors_may_be_observed_than_the_file_knows_but_not_more(small) -> None:
    everything = observed(small.convs(), small.batches())
    model = calibrated(small.convs(), (), statistics=everything, excluded=["/a"])
    expected = calibrated(small.convs(), small.batches(), excluded=["/a"])
    assert_same_scales(model, expected)
    few = observed(small.convs(), small.batches(), excluded=["/a"])
    with pytest.raises(StatisticsError, match=r"tensor.* here and not in the statistics"):
        calibrated(small.convs(), (), statistics=few)


def test_what_was_returned_to_float_is_so_again_and_can_come_back(small, tmp_path: Path) -> None:
    source, batches = masked(small), small.batches(4)
    first = calibrated(source, batches[:2])
    assert "mask values" in first.plan.nodes["/b"].reason
    statistics = qwrap.Statistics.of(first)
    assert statistics.tensors["b"].masked == 2 * 2 * 6 * 8 * 2
    statistics.save(tmp_path / "s")
    again = calibrated(source, batches[2:], statistics=tmp_path / "s")
    assert_same(qwrap.Statistics.of(again), observed(source, batches))
    assert {k: n.role for k, n in again.plan.nodes.items()} == {
        k: n.role for k, n in first.plan.nodes.items()
    }
    qwrap.calibrate(first, batches, progress=False)  # on the same model too
    assert_same_scales(first, again)
    assert_same(qwrap.Statistics.of(first), qwrap.Statistics.of(again))


def test_nodes_that_only_earlier_data_ruined_come_back(small) -> None:
    source = overflowing(small)
    model = prepared(source)
    qwrap.calibrate(model, [b * 1e6 for b in small.batches()], progress=False)
    assert model.plan.nodes["/y"].role == "float"
    assert qwrap.Statistics.of(model).tensors["d"].nonfinite
    qwrap.calibrate(model, [b * 1e-20 for b in small.batches()], progress=False)
    assert model.plan.nodes["/y"].role == "integer"


def test_another_model_is_refused_and_the_calibration_stays(small) -> None:
    model = calibrated(small.convs(), small.batches())
    statistics = qwrap.Statistics.of(model)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.stored("w2").add_(1)
    with pytest.raises(StatisticsError, match=r"of another model: weights w2 \(1 of 4\) differ; c"):
        qwrap.calibrate(model, (), statistics=statistics, progress=False)
    assert torch.equal(model.tap(ValuePoint("x")).scale, before.tap(ValuePoint("x")).scale)
    other = small.build("y = Conv(x, w)", {"w": (4, 3, 1, 1)})
    with pytest.raises(StatisticsError, match="1 nodes here, 3 there; the first difference is at"):
        calibrated(other, (), statistics=statistics)


def test_a_tensor_of_no_graph_is_refused(small) -> None:
    statistics = observed(small.convs(), small.batches())
    tensors = {**statistics.tensors, "other": statistics.tensors["x"]}
    wrong = qwrap.Statistics(batches=1, fingerprint=statistics.fingerprint, tensors=tensors)
    with pytest.raises(StatisticsError, match="damaged: tensor 'other' is in no graph"):
        calibrated(small.convs(), (), statistics=wrong)


def test_ranges_per_channel_do_not_stand_for_one_range(small) -> None:
    statistics = observed(small.convs(), small.batches())
    channels = HistogramObserver("x", axis=1)
    channels.observe(torch.from_numpy(small.batches()[0]))
    tensors = {**statistics.tensors, "x": type(statistics.tensors["x"]).of(channels)}
    wrong = qwrap.Statistics(batches=1, fingerprint=statistics.fingerprint, tensors=tensors)
    with pytest.raises(StatisticsError, match="'x': the statistics have one range per channel of"):
        calibrated(small.convs(), (), statistics=wrong)


def test_shapes_may_differ_and_tensors_be_empty(small, tmp_path: Path) -> None:
    source = small.convs(inputs="float[N,3,H,W] x")
    shapes = [(2, 3, 8, 8), (0, 3, 8, 8), (1, 3, 5, 11), (3, 3, 2, 1)]
    batches = [small.batches(1, shape)[0] for shape in shapes]
    observed(source, batches[:2]).save(tmp_path / "s.json")
    model = calibrated(source, batches[2:], statistics=tmp_path / "s.json")
    whole = observed(source, batches)
    assert_same(qwrap.Statistics.of(model), whole)
    assert whole.tensors["x"].count == sum(b.size for b in batches)
    assert (whole.batches, whole.tensors["x"].batches) == (4, 3)


# --- the table


def test_the_summary_begins_with_what_is_not_finite(small) -> None:
    source = overflowing(small)
    statistics = observed(source, [b * 1e6 for b in small.batches()])
    title, head, *rows = statistics.summary().splitlines()
    assert title == "4 tensors in 3 batches, 2 with values that are not finite"
    assert len({len(line) for line in (head, *rows)}) == 1
    assert [row.split()[0] for row in rows] == [
        "d",
        "y",
        *(n for n in statistics.tensors if n not in "dy"),
    ]
    for row in rows:
        name, values, masked, nonfinite, low, high = row.split()
        found = statistics.tensors[name]
        assert (int(values), int(masked), int(nonfinite)) == (
            found.count,
            found.masked,
            found.nonfinite,
        )
        if found.count:
            assert float(low) == pytest.approx(float(found.low), rel=1e-5)  # six digits are shown
            assert float(high) == pytest.approx(float(found.high), rel=1e-5)
        else:
            assert low == high == "-"


# --- a real network


@pytest.fixture
def network() -> Path:
    path = SHARED / "models" / "resnet20_cifar10.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    return path


def test_parts_of_a_real_network_make_the_whole(small, network: Path, tmp_path: Path) -> None:
    """Tensors of every size: the large ones are sampled, the small ones taken whole."""
    batches = small.batches(3, (2, 3, 32, 32))
    whole = calibrated(network, batches)
    file = tmp_path / "s"
    observed(network, batches[:1]).save(file)
    model = calibrated(network, batches[1:], statistics=file)
    assert_same(qwrap.Statistics.of(model), qwrap.Statistics.of(whole))
    assert_same_scales(model, whole)
    merged = observed(network, batches[1:]).merge(qwrap.Statistics.load(file))
    assert_same(merged, qwrap.Statistics.of(whole), averages=1)
    assert_same_scales(calibrated(network, (), statistics=merged), whole)
    changed = onnx.load(network)
    weight = next(t for t in changed.graph.initializer if len(t.raw_data) > 1000)
    weight.raw_data = weight.raw_data[:-4] + b"\0" * 4
    with pytest.raises(StatisticsError, match=r"of another model: weights .* \(1 of 47\) differ"):
        calibrated(changed, (), statistics=file)
