"""The embedded example holds what it says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qwrap.demo import batches, digits, model_path

FOLDER = Path(model_path()).parent


def test_model_and_data_stay_within_three_megabytes() -> None:
    names = ["digits.onnx", *(path.name for path in FOLDER.glob("*.gz"))]
    assert sum((FOLDER / name).stat().st_size for name in names) <= 3_000_000


@pytest.mark.parametrize(("split", "count"), [("train", 7000), ("calibration", 500)])
def test_splits_have_their_sizes(split, count: int) -> None:
    images, labels = digits(split)
    assert images.shape == (count, 1, 28, 28)
    assert labels.shape == (count,)


def test_the_splits_share_no_image_and_leave_none_out() -> None:
    parts = [digits(split)[0] for split in ("train", "calibration", "validation")]
    images = np.concatenate(parts).reshape(10_000, -1)
    assert len(np.unique(images, axis=0)) == 10_000  # MNIST's test set has no duplicates


def test_pixels_are_between_zero_and_one() -> None:
    images, _ = digits("calibration")
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)


def test_batches_hold_every_image_once() -> None:
    found = np.concatenate([batch["image"] for batch in batches("calibration", 64)])
    np.testing.assert_array_equal(found, digits("calibration")[0])


def test_the_float_model_reads_98_percent_of_the_validation_digits() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model_path(), options)
    images, labels = digits("validation")
    (logits,) = session.run(None, {"image": images})
    assert (logits.argmax(1) == labels).mean() >= 0.98


def test_the_model_shows_what_quantization_meets() -> None:
    model = onnx.load(model_path())
    found = {node.op_type for node in model.graph.node}
    assert found >= {"Conv", "BatchNormalization", "Relu", "Clip", "Add", "GlobalAveragePool"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_licence_of_the_data_lies_beside_it() -> None:
    assert "by-sa/3.0" in (FOLDER / "LICENCE-DATA.txt").read_text(encoding="utf-8")
