import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, ExportError, InputError, ModelError
from qwrap.model.points import ValuePoint


def test_one_call_gives_a_file_that_the_model_simulates_exactly(small, tmp_path: Path) -> None:
    onnx.save(small.convs(), tmp_path / "m.onnx")
    target = tmp_path / "q.onnx"
    model = qwrap.quantize(
        tmp_path / "m.onnx",
        target,
        calibration=small.batches(),
        config=qwrap.QConfig(scope="kernels"),
        progress=False,
    )
    assert qwrap.verify(model, target, small.batches(), progress=False).deployed.differing == 0
    expected, found = (
        small.run(path, small.batches()[0])[0] for path in (tmp_path / "m.onnx", target)
    )
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(found - expected)) > 25


def test_it_equals_the_steps_by_hand(small, tmp_path: Path) -> None:
    batches = small.batches()
    qwrap.quantize(
        small.convs(),
        tmp_path / "a",
        calibration=batches,
        config=qwrap.QConfig(scope="kernels"),
        progress=False,
    )
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, batches, progress=False)
    qwrap.improve(model, batches, progress=False)
    qwrap.guard(model, batches, progress=False)
    qwrap.export(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("length", ["none", "raises"])
def test_a_stream_is_read_once(small, tmp_path: Path, length: str) -> None:
    class Stream(torch.utils.data.IterableDataset):
        reads = 0

        def __iter__(self):
            type(self).reads += 1
            yield from map(torch.from_numpy, small.batches())

    stream = Stream() if length == "none" else torch.utils.data.DataLoader(Stream(), None)
    qwrap.quantize(
        small.convs(),
        tmp_path / "q",
        calibration=stream,
        config=qwrap.QConfig(scope="kernels"),
        progress=False,
    )
    assert Stream.reads == 1


@pytest.mark.parametrize("alias", ["same", "link"])
def test_the_source_is_never_replaced(small, tmp_path: Path, alias: str) -> None:
    source, target = tmp_path / "m.onnx", tmp_path / "m.onnx"
    onnx.save(small.convs(), source)
    if alias == "link":
        target = tmp_path / "link.onnx"
        target.symlink_to(source)
    before = source.read_bytes()
    with pytest.raises(ExportError, match="is the float model itself"):
        qwrap.quantize(
            source,
            target,
            calibration=small.batches(),
            config=qwrap.QConfig(scope="kernels"),
            progress=False,
        )
    assert source.read_bytes() == before


def bad_batch(small):
    batch = small.batches()[0]
    batch[0, 0, 0, 0] = np.nan
    return [batch]


ERRORS = {
    "no data": (InputError, "no batches", lambda _: []),
    "NaN": (InputError, "batch 0: input 'x': 1 of 384 values", bad_batch),
    "rank": (InputError, "batch 0: input 'x': expected 4 dimensions", lambda _: [np.zeros(3)]),
    "type": (InputError, "batch 0: input 'x'", lambda _: [np.zeros((1, 3, 8, 8), np.int64)]),
    "name": (InputError, r"graph inputs \['x'\] are missing", lambda _: [{"y": np.zeros(1)}]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_data_is_refused_and_writes_nothing(small, tmp_path: Path, case: str) -> None:
    error, message, batches = ERRORS[case]
    with pytest.raises(error, match=message):
        qwrap.quantize(
            small.convs(), tmp_path / "q.onnx", calibration=batches(small), progress=False
        )
    assert not os.listdir(tmp_path)


def test_bad_files_and_settings_are_refused(small, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(small.convs().SerializeToString()[:-200])
    for name in ("missing.onnx", "cut.onnx"):
        with pytest.raises(ModelError, match=name):
            qwrap.quantize(tmp_path / name, tmp_path / "q", calibration=[], progress=False)
    with pytest.raises(ConfigError, match="exclude 'nothing'"):
        qwrap.quantize(
            small.convs(),
            tmp_path / "q",
            calibration=small.batches(),
            config=qwrap.QConfig(scope="kernels", excluded=["nothing"]),
            progress=False,
        )
    assert os.listdir(tmp_path) == ["cut.onnx"]


def test_what_was_corrected_is_in_the_summary(small, tmp_path: Path) -> None:
    batches = [np.abs(b) for b in small.batches(4)]
    model = qwrap.quantize(
        small.convs(),
        tmp_path / "q",
        calibration=batches,
        config=qwrap.QConfig(scope="kernels"),
        progress=False,
    )
    summary = model.plan.summary()
    corrected = "kept:      bias correction" in summary or "kept:      GPTQ rounding" in summary
    changed = not torch.equal(model.stored("b2"), qwrap.load(small.convs()).stored("b2"))
    assert corrected == changed


def test_a_target_that_cannot_be_written_is_refused_before_any_work(small, tmp_path: Path) -> None:
    def never():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ExportError, match="does not exist; make it first"):
        qwrap.quantize(small.convs(), tmp_path / "no" / "q.onnx", calibration=never())
    with pytest.raises(ExportError, match="is a folder"):
        qwrap.quantize(small.convs(), tmp_path, calibration=never())


# --- statistics


def quantized(small, target: Path, **arguments) -> qwrap.WrappedModel:
    config = arguments.pop("config", qwrap.QConfig(scope="kernels"))
    return qwrap.quantize(small.convs(), target, config=config, progress=False, **arguments)


def test_the_file_of_statistics_spares_observing_again(small, tmp_path: Path) -> None:
    batches, file = small.batches(40), tmp_path / "s"
    quantized(small, tmp_path / "a", calibration=batches)
    quantized(small, tmp_path / "b", calibration=batches, statistics=file)
    found = qwrap.Statistics.load(file)
    assert found.batches == 40
    before = file.read_bytes()
    model = quantized(small, tmp_path / "c", calibration=iter(batches), statistics=file)
    assert file.read_bytes() == before
    assert model.tap(qwrap.model.points.ValuePoint("x")).observer.seen == 40 * 384  # not 80
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("stop", [3, 37])
def test_an_interrupted_call_goes_on_where_it_stopped(small, tmp_path: Path, stop: int) -> None:
    batches, file, target = small.batches(40), tmp_path / "s.json", tmp_path / "q"

    def failing():
        yield from batches[:stop]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        quantized(small, target, calibration=failing(), statistics=file)
    assert not target.exists()
    assert qwrap.Statistics.load(file).batches == stop
    quantized(small, target, calibration=batches, statistics=file)
    assert qwrap.Statistics.load(file).batches == 40
    quantized(small, tmp_path / "whole", calibration=batches)
    assert target.read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_configuration_takes_its_ranges_from_the_file(small, tmp_path: Path) -> None:
    batches, file = small.batches(), tmp_path / "s"
    quantized(small, tmp_path / "q", calibration=batches, statistics=file)
    before = file.read_bytes()
    for settings in (
        {"method": "entropy"},
        {"method": "auto"},
        {"excluded": ["/y"]},
        {"activation": "int8"},
        {"weight": "int4"},
    ):
        config = qwrap.QConfig(scope="kernels", **settings)
        quantized(small, tmp_path / "a", calibration=batches, statistics=file, config=config)
        quantized(small, tmp_path / "b", calibration=batches, config=config)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert file.read_bytes() == before  # also what no node needs now


def test_without_data_weights_stay_as_they_are_and_that_is_said(small, tmp_path: Path) -> None:
    statistics = tmp_path / "s"
    quantized(small, tmp_path / "a", calibration=small.batches(), statistics=statistics)
    model = quantized(small, tmp_path / "b", statistics=qwrap.Statistics.load(statistics))
    assert "weights and biases as they were: no data" in model.plan.summary()
    float_model = qwrap.load(small.convs())
    for name in ("w1", "b1", "w2", "b2"):
        assert torch.equal(model.stored(name), float_model.stored(name))
    report = qwrap.verify(model, tmp_path / "b", small.batches(), progress=False)
    assert report.deployed.differing == 0


def test_weights_alone_need_no_data(small, tmp_path: Path) -> None:
    config = qwrap.QConfig(activation=None)
    model = qwrap.quantize(small.convs(), tmp_path / "q", config=config, progress=False)
    (expected,), (found,) = (
        (model(torch.from_numpy(small.batches()[0])).detach().numpy(),),
        small.run(tmp_path / "q", small.batches()[0]),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 sums in another order


def test_ranges_have_to_come_from_somewhere(small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="statistics that exist, or a table"):
        quantized(small, tmp_path / "q")
    with pytest.raises(ConfigError, match="statistics that exist, or a table"):
        quantized(small, tmp_path / "q", statistics=tmp_path / "missing")
    assert os.listdir(tmp_path) == []


# --- tables


def test_a_table_stands_for_calibration(small, tmp_path: Path) -> None:
    batches = small.batches()
    model = quantized(small, tmp_path / "a", calibration=batches)
    qwrap.RangeTable.of(model).write(tmp_path / "t", "aimet-2.0.0")
    again = quantized(small, tmp_path / "b", table=tmp_path / "t")
    for name in ("x", "b", "y"):
        a, b = (m.tap(ValuePoint(name)) for m in (model, again))
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.zero_point, b.zero_point)


def test_a_table_goes_before_what_data_shows(small, tmp_path: Path) -> None:
    table = qwrap.RangeTable({"x": qwrap.TensorRange(-51, 204)})
    model = quantized(small, tmp_path / "a", calibration=small.batches(), table=table)
    assert model.tap(ValuePoint("x")).scale == 1
    assert model.tap(ValuePoint("x")).zero_point == 51
    assert model.tap(ValuePoint("y")).scale < 1


@pytest.mark.parametrize("kind", ["list", "iterator"])
def test_fine_tuning_brings_the_file_closer_to_the_float_one(small, tmp_path: Path, kind) -> None:
    onnx.save(small.convs(), tmp_path / "m.onnx")
    x = small.batches(1, (16, 3, 8, 8), seed=3)[0]
    (expected,) = small.run(tmp_path / "m.onnx", x)
    errors = []
    for steps in (None, 200):
        batches = small.batches(20, (8, 3, 8, 8))
        model = qwrap.quantize(
            tmp_path / "m.onnx",
            tmp_path / "q.onnx",
            calibration=batches if kind == "list" else iter(batches),
            config=qwrap.QConfig(scope="kernels", weight="int2"),
            min_sqnr=None,
            finetune=steps,
            progress=False,
        )
        errors.append(np.square(small.run(tmp_path / "q.onnx", x)[0] - expected).mean())
    assert errors[1] < errors[0]
    assert "fine-tuned for" in model.plan.summary()


def test_fine_tuning_needs_data_and_something_quantized(small, tmp_path: Path) -> None:
    for settings in ({"finetune": 5}, {"finetune": 0, "calibration": small.batches()}):
        with pytest.raises(ConfigError, match="takes 1 step or more, and calibration data"):
            qwrap.quantize(small.convs(), tmp_path / "q", **settings)
    config = qwrap.QConfig()
    config.exclude("*")
    data = {"calibration": small.batches(), "config": config, "progress": False}
    model = qwrap.quantize(small.convs(), tmp_path / "q", finetune=5, **data)
    assert "not fine-tuned: nothing is quantized" in model.plan.summary()
