import io
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, ExportError, InputError, StatisticsError
from qwrap.quant import session
from qwrap.quant.early_stop import EarlyStop


def prepared(source, **settings) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def calibrated(source, batches, **arguments) -> qwrap.WrappedModel:
    model = prepared(source)
    qwrap.calibrate(model, batches, progress=False, **arguments)
    return model


def assert_same(a: qwrap.Statistics, b: qwrap.Statistics) -> None:
    assert a.fingerprint == b.fingerprint
    assert a.batches == b.batches
    assert a.tensors.keys() == b.tensors.keys()
    for name, mine in a.tensors.items():
        theirs = b.tensors[name]
        assert (mine.count, mine.batches) == (theirs.count, theirs.batches)
        for key in ("extremes", "averages", "counts", "exponent"):
            assert torch.equal(getattr(mine, key), getattr(theirs, key)), (name, key)


# --- saving


def test_what_was_seen_is_written_at_the_end(small, tmp_path: Path) -> None:
    model = calibrated(small.convs(), small.batches(), save=tmp_path / "s")
    assert_same(qwrap.Statistics.load(tmp_path / "s"), qwrap.Statistics.of(model))
    other = prepared(small.convs())
    with qwrap.calibrating(other, save=str(tmp_path / "t")):
        for batch in small.batches():
            other(torch.from_numpy(batch))
    assert_same(qwrap.Statistics.load(tmp_path / "t"), qwrap.Statistics.of(model))


def failing(batches, error):
    yield from batches
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk"), ValueError("corrupt")])
def test_an_interrupted_calibration_goes_on_as_if_in_one_go(small, tmp_path: Path, error) -> None:
    batches, path = small.batches(6), tmp_path / "s"
    model = prepared(small.convs())
    with pytest.raises(type(error)):
        qwrap.calibrate(model, failing(batches[:4], error), save=path, progress=False)
    done = qwrap.Statistics.load(path)
    assert done.batches == 4
    rest = itertools.islice(batches, done.batches, None)
    qwrap.calibrate(model, rest, statistics=done, save=path, progress=False)
    whole = qwrap.Statistics.of(calibrated(small.convs(), batches))
    assert_same(qwrap.Statistics.of(model), whole)
    assert_same(qwrap.Statistics.load(path), whole)


def test_a_batch_that_does_not_fit_loses_none_of_those_before(small, tmp_path: Path) -> None:
    batches = [*small.batches(2), np.zeros(3, np.float32)]
    with pytest.raises(InputError, match="batch 2"):
        calibrated(small.convs(), batches, save=tmp_path / "s")
    assert qwrap.Statistics.load(tmp_path / "s").batches == 2


def test_an_interruption_inside_a_batch_leaves_the_last_file(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tensors have seen the batch by then, so that nothing true could be written."""
    path, model = tmp_path / "s", prepared(small.convs())
    monkeypatch.setattr(session, "SECONDS", 0.0)
    monkeypatch.setattr(session, "SHARE", 1e9)

    def interrupted(*_):
        if seen["batches"] == 2:
            raise KeyboardInterrupt
        seen["batches"] += 1

    seen = {"batches": 0}
    model.tap(qwrap.model.points.ValuePoint("b")).register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        qwrap.calibrate(model, small.batches(5), save=path, progress=False)
    expected = qwrap.Statistics.of(calibrated(small.convs(), small.batches(5)[:2]))
    assert_same(qwrap.Statistics.load(path), expected)


def test_files_are_written_now_and_then(small, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(session, "SECONDS", 0.0)
    monkeypatch.setattr(session, "SHARE", 1e9)
    found = []

    def batches():
        for batch in small.batches(3):
            found.append(qwrap.Statistics.load(tmp_path / "s").batches if found else 0)
            yield batch

    calibrated(small.convs(), batches(), save=tmp_path / "s")
    assert found == [0, 1, 2]


def test_an_interruption_before_any_batch_writes_nothing(small, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrated(small.convs(), failing([], KeyboardInterrupt()), save=tmp_path / "s")
    assert os.listdir(tmp_path) == []


def never():
    raise AssertionError("data was read")
    yield


def test_what_cannot_be_saved_or_read_is_refused_before_any_work(small, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist; make it first"):
        calibrated(small.convs(), never(), save=tmp_path / "no" / "s")
    with pytest.raises(StatisticsError, match="missing: cannot be read"):
        calibrated(small.convs(), never(), statistics=tmp_path / "missing")


def test_an_empty_iterable_is_refused_without_statistics(small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no batches"):
        calibrated(small.convs(), [], save=tmp_path / "s")


# --- stopping early


def test_calibration_stops_when_no_range_moves_and_says_so(small) -> None:
    batches, used = small.batches(1) * 20, []
    model = calibrated(small.convs(), (used.append(b) or b for b in batches), early_stop=3)
    # A first look after 3 batches, and one after 6 that finds what the first one did.
    assert len(used) == 6
    line = next(line for line in model.plan.changes if "stopped early" in line)
    assert line == (
        "calibration stopped early after 6 batches: no range had widened by more than 1% "
        "in the last 3"
    )
    assert line in model.plan.summary()
    qwrap.calibrate(model, batches[:2], progress=False)
    assert not any("stopped early" in line for line in model.plan.changes)


def test_ranges_that_still_grow_are_watched_to_the_end(small) -> None:
    batches = [small.batches(1)[0] * (1 + i / 10) for i in range(10)]
    model = calibrated(small.convs(), batches, early_stop=1)
    assert qwrap.Statistics.of(model).batches == 10
    assert not any("stopped early" in line for line in model.plan.changes)


@pytest.mark.parametrize(("growth", "stops"), [(1.0099, True), (1.0101, False)])
def test_one_percent_of_the_width_is_the_limit(small, growth: float, stops: bool) -> None:
    model = prepared(small.build("y = Conv(x, w)", {"w": np.ones((4, 3, 1, 1), np.float32)}))
    stop = EarlyStop(model, 1)
    settled = []
    with qwrap.calibrating(model):
        for width in (1.0, growth):
            model(torch.tensor([-width, 0, width]).expand(1, 3, 3)[..., None].contiguous())
            settled.append(stop.is_settled())
    assert settled == [False, stops]


def test_a_constant_tensor_does_not_keep_calibration_going(small) -> None:
    model = calibrated(small.convs(), [np.zeros((2, 3, 8, 8), np.float32)] * 9, early_stop=2)
    assert qwrap.Statistics.of(model).batches == 4


def test_early_stop_takes_a_number_of_batches(small) -> None:
    with pytest.raises(ConfigError, match="early_stop=0: expected a number of batches, 1 or more"):
        calibrated(small.convs(), never(), early_stop=0)


def test_sharded_parameters_do_not_stop_early(small) -> None:
    """Every forward is a collective there, which a rank that stopped would leave hanging."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = prepared(small.convs())
        module, name = next((m, n) for m in model.modules() for n in m._parameters)
        sharded = torch.distributed.tensor.distribute_tensor(getattr(module, name), mesh)
        module.register_parameter(name, torch.nn.Parameter(sharded))
        with pytest.raises(ConfigError, match="early_stop: the parameters are sharded"):
            qwrap.calibrate(model, never(), early_stop=2, progress=False)
    finally:
        torch.distributed.destroy_process_group()


# --- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(small, monkeypatch, batches, **arguments) -> str:
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = prepared(small.convs())
    qwrap.calibrate(model, batches, **arguments)
    return sys.stderr.getvalue()


def test_the_bar_estimates_the_time_left_where_it_knows_the_length(small, monkeypatch) -> None:
    for text in (
        shown(small, monkeypatch, small.batches(4)),
        shown(small, monkeypatch, iter(small.batches(4)), total=4),
    ):
        assert "calibrating: 100%" in text
        assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, .*batch", text)


def test_the_bar_counts_where_it_does_not(small, monkeypatch) -> None:
    text = shown(small, monkeypatch, iter(small.batches(4)))
    assert re.search(r"calibrating: 4batch \[\d\d:\d\d, .*batch", text)
    assert "%" not in text


def test_nothing_is_shown_off_a_terminal_or_when_asked(small, monkeypatch, capsys) -> None:
    assert shown(small, monkeypatch, small.batches(), progress=False) == ""
    monkeypatch.undo()
    qwrap.calibrate(prepared(small.convs()), small.batches())
    assert capsys.readouterr() == ("", "")
