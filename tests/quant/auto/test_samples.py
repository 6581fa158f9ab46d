"""What calibration keeps of its data: little, its own copy, and nothing that travels."""

import copy
import io

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, NotCalibratedError
from qwrap.quant.auto.samples import JOINED, JOINED_BYTES, Samples


def calibrated(small, batches, **settings):
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model


def kept(model) -> np.ndarray:
    return np.concatenate([batch["x"].numpy() for batch in model.samples.batches])


def test_the_first_samples_are_kept(small) -> None:
    batches = small.batches(9, (4, 3, 8, 8))
    model = calibrated(small, batches, kept_samples=10)
    assert np.array_equal(kept(model), np.concatenate(batches)[:10])
    assert model.samples.count == 10


def test_none_are_kept_where_none_are_wanted(small) -> None:
    model = calibrated(small, small.batches(), kept_samples=0)
    assert model.samples.batches == []
    with pytest.raises(NotCalibratedError, match="there are none; calibrate"):
        qwrap.rescale(model, method="auto")
    with pytest.raises(ConfigError, match="kept_samples=-1"):
        qwrap.QConfig(kept_samples=-1)


def test_the_users_own_loop_may_reuse_its_buffer(small) -> None:
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    buffer, batches = torch.empty(2, 3, 8, 8), small.batches()
    with qwrap.calibrating(model):
        for batch in batches:
            model(buffer.copy_(torch.from_numpy(batch)))
    assert np.array_equal(kept(model), np.concatenate(batches))


def test_room_is_bounded() -> None:
    samples = Samples(100, room=3 * 400)
    for value in range(5):
        samples.take({"x": torch.full((1, 100), float(value))}, divisible=True)
    assert samples.count == 3
    assert sum(batch["x"].nbytes for batch in samples.batches) == 3 * 400


def test_a_batch_that_cannot_be_divided_stays_whole() -> None:
    samples = Samples(3)
    for _ in range(4):
        samples.take({"x": torch.zeros(2, 5), "state": torch.zeros(1, 2)}, divisible=False)
    assert samples.count == 3
    assert [len(batch["x"]) for batch in samples.batches] == [2, 2, 2]


def test_samples_of_unlike_shape_stay_apart_and_large_ones_too() -> None:
    samples = Samples(10)
    large = torch.zeros(1, JOINED_BYTES // 4)
    for x in (torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 6), large, large):
        samples.take({"x": x}, divisible=True)
    assert [tuple(batch["x"].shape) for batch in samples.batches] == [
        (2, 5),
        (1, 6),
        (1, JOINED_BYTES // 4),
        (1, JOINED_BYTES // 4),
    ]


def test_small_batches_are_joined_up_to_some_samples() -> None:
    samples = Samples(100)
    for value in range(20):
        samples.take({"x": torch.full((1, 5), float(value))}, divisible=True)
    assert samples.sizes == [JOINED, JOINED, 20 - 2 * JOINED]
    assert torch.cat([b["x"] for b in samples.batches])[:, 0].tolist() == list(range(20))


def test_empty_batches_are_not_kept() -> None:
    samples = Samples(10)
    samples.take({"x": torch.zeros(0, 5)}, divisible=True)
    assert samples.batches == []


def test_neither_a_copy_nor_a_file_holds_data(small) -> None:
    model = calibrated(small, small.batches())
    assert model.samples.count
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.samples is None


def test_a_failed_calibration_leaves_none(small) -> None:
    model = calibrated(small, small.batches())

    def broken():
        yield small.batches()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwrap.calibrate(model, broken(), progress=False)
    assert model.samples is None
