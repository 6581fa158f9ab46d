"""Calibration data of the shell: every kind, and every way to get it wrong."""

import csv
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from qwrap.data import (
    PRESETS,
    GraphInput,
    Preprocessing,
    graph_inputs,
    open_data,
    read_preprocessing,
)
from qwrap.errors import ConfigError, InputError, ModelError

RNG = np.random.default_rng(0)
BESIDE = Path(__file__).resolve().parents[1] / "../shared"
SHARED = Path(os.environ.get("QWRAP_SHARED", BESIDE))


def wanted(name: str = "x", shape: tuple = (None, 3, 8, 8), dtype: type = np.float32) -> GraphInput:
    return GraphInput(name=name, dtype=np.dtype(dtype), shape=shape)


def rows(batches) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in batches])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five 20 x 10 images: image i has pixel values 10 * i + (0, 1, 2) in R, G, B."""
    for i in range(5):
        pixels = np.full((10, 20, 3), (10 * i, 10 * i + 1, 10 * i + 2), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


# --- graph inputs


def model_file(path: Path, **shapes: list) -> Path:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    node = helper.make_node("Identity", [next(iter(shapes))], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", values, [output])
    graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    onnx.save(helper.make_model(graph), path)
    return path


def test_graph_inputs_leave_initialisers_out_and_open_dimensions_are_none(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", x=["N", 3, 8, 8], w=[1])
    assert graph_inputs(path) == [wanted()]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx: cannot be read \(No such file"):
        graph_inputs(tmp_path / "absent.onnx")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"text\.onnx: (not an ONNX model|holds no ONNX graph)"):
        graph_inputs(path)


def test_a_truncated_model_is_named(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", x=["N", 3, 8, 8])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match=r"m\.onnx: not an ONNX model"):
        graph_inputs(path)


# --- arrays


def test_npz_is_cut_into_batches_in_order(tmp_path: Path) -> None:
    x = RNG.random((37, 3, 8, 8), np.float32)
    np.savez(tmp_path / "d.npz", x=x, label=np.arange(37))
    batches = open_data(str(tmp_path / "d.npz"), [wanted()])
    assert [len(batch["x"]) for batch in batches] == [16, 16, 5]
    np.testing.assert_array_equal(rows(batches), x)  # a second pass reads the same again


def test_limit_counts_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", RNG.random((37, 3, 8, 8), np.float32))
    batches = open_data(str(tmp_path / "d.npy"), [wanted()], limit=20, batch_size=8)
    assert [len(batch["x"]) for batch in batches] == [8, 8, 4]


def test_a_fixed_batch_size_is_kept_and_the_rest_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", RNG.random((10, 3, 8, 8), np.float32))
    batches = open_data(str(tmp_path / "d.npy"), [wanted(shape=(4, 3, 8, 8))])
    assert [len(batch["x"]) for batch in batches] == [4, 4]


def test_a_batch_size_against_the_fixed_one_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros((10, 3, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="batch_size=8: the model's is fixed at 4"):
        open_data(str(tmp_path / "d.npy"), [wanted(shape=(4, 3, 8, 8))], batch_size=8)


def test_files_of_single_samples_are_joined(tmp_path: Path) -> None:
    x = RNG.random((5, 3, 8, 8), np.float32)
    for i, sample in enumerate(x):
        np.save(tmp_path / f"{i}.npy", sample)
    batches = open_data(str(tmp_path), [wanted()], batch_size=2)
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(rows(batches), x)


def test_samples_of_unlike_lengths_never_share_a_batch(tmp_path: Path) -> None:
    for i, length in enumerate((5, 5, 7, 5)):
        np.savez(tmp_path / f"{i}.npz", x=np.zeros((1, length), np.int64))
    batches = open_data(str(tmp_path), [wanted(shape=(None, None), dtype=np.int64)])
    assert [batch["x"].shape for batch in batches] == [(2, 5), (1, 7), (1, 5)]


def test_inputs_without_a_common_first_axis_pass_whole(tmp_path: Path) -> None:
    state, rate = np.zeros((2, 1, 4), np.float32), np.int64(16000)
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=np.zeros((1, 6), np.float32), state=state, sr=rate)
    inputs = [
        wanted(shape=(None, 6)),
        wanted("state", (2, None, 4)),
        wanted("sr", (), np.int64),
    ]
    shapes = [{k: v.shape for k, v in b.items()} for b in open_data(str(tmp_path), inputs)]
    assert shapes == 3 * [{"x": (1, 6), "state": (2, 1, 4), "sr": ()}]


def test_a_leading_axis_over_all_inputs_counts_batches(tmp_path: Path) -> None:
    state = RNG.random((3, 2, 1, 4), np.float32)
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 1, 6), np.float32), state=state)
    inputs = [wanted(shape=(None, 6)), wanted("state", (2, None, 4))]
    batches = list(open_data(str(tmp_path / "d.npz"), inputs))
    np.testing.assert_array_equal(np.stack([batch["state"] for batch in batches]), state)


def test_a_missing_array_names_what_the_file_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=np.zeros((2, 3), np.float32), label=np.arange(2))
    with pytest.raises(InputError, match=r"no array for 'x' .*holds 'image' float32\[2, 3\]"):
        list(open_data(str(tmp_path / "d.npz"), [wanted()]))


def test_a_wrong_rank_names_both_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((8, 8), np.float32))
    with pytest.raises(InputError, match=r"'x' got .*\[8, 8\]; the model takes \[\?, 3, 8, 8\]"):
        list(open_data(str(tmp_path / "d.npz"), [wanted()]))


def test_a_wrong_size_names_both_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(InputError, match=r"\[2, 8, 8, 3\]; the model takes \[\?, 3, 8, 8\]"):
        list(open_data(str(tmp_path / "d.npz"), [wanted()]))


def test_integers_for_a_float_input_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"got uint8; the model takes float32; .*units"):
        list(open_data(str(tmp_path / "d.npz"), [wanted()]))


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full((2, 4), 2**40))
    with pytest.raises(InputError, match="do not fit into the model's int32"):
        list(open_data(str(tmp_path / "d.npz"), [wanted(shape=(None, 4), dtype=np.int32)]))


def test_double_becomes_the_models_float(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=RNG.random((2, 3, 8, 8)))
    (batch,) = open_data(str(tmp_path / "d.npz"), [wanted()])
    assert batch["x"].dtype == np.float32


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"d\.npy: not a readable \.npy file"):
        list(open_data(str(tmp_path / "d.npy"), [wanted()]))


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but cut", b"\x93NUMPY\x01\x00"])
def test_broken_array_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not a readable"):
        list(open_data(str(tmp_path / name), [wanted()]))


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros((0, 3, 8, 8), np.float32))
    with pytest.raises(InputError, match=r"d\.npy: no samples"):
        list(open_data(str(tmp_path / "d.npy"), [wanted()]))


# --- images


def test_images_are_resized_scaled_and_normalised(folder: Path) -> None:
    batches = open_data(str(folder), [wanted()], preprocessing=PRESETS["imagenet"])
    x = rows(batches)
    mean, std = np.float64([0.485, 0.456, 0.406]), np.float64([0.229, 0.224, 0.225])
    pixels = 10 * np.arange(5)[:, None] + np.arange(3)  # constant images stay so when resized
    expected = ((pixels / 255 - mean) / std)[:, :, None, None]
    assert x.shape == (5, 3, 8, 8)
    np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("preset", "expected"), [("unit", 40 / 255), ("tf", 40 / 127.5 - 1), ("raw", 40)]
)
def test_presets_scale_as_their_names_say(folder: Path, preset: str, expected: float) -> None:
    x = rows(open_data(str(folder), [wanted()], preprocessing=PRESETS[preset]))
    np.testing.assert_allclose(x[4, 0], expected, rtol=1e-6)


def test_caffe_is_bgr_minus_the_mean(folder: Path) -> None:
    x = rows(open_data(str(folder), [wanted()], preprocessing=PRESETS["caffe"]))
    expected = np.float32([42, 41, 40]) - np.float32([103.939, 116.779, 123.68])
    np.testing.assert_array_equal(x[4, :, 0, 0], expected)


def test_shorter_resizes_then_crops_the_centre(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (10, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    settings = Preprocessing(resize="shorter", shorter=10, scale=1.0)  # 10 already: only the crop
    x = rows(open_data(str(tmp_path), [wanted()], preprocessing=settings))
    np.testing.assert_array_equal(x[0], pixels[1:9, 6:14].transpose(2, 0, 1))


def test_layout_and_luminance_follow_the_model(folder: Path) -> None:
    target = wanted(shape=(None, 8, 8, 1))
    x = rows(open_data(str(folder), [target], preprocessing=PRESETS["raw"]))
    assert x.shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(x[2], 21)  # of (20, 21, 22): 0.299 R + 0.587 G + 0.114 B


def test_a_uint8_input_gets_pixels(folder: Path) -> None:
    target = wanted(shape=(None, 3, 8, 8), dtype=np.uint8)
    x = rows(open_data(str(folder), [target], preprocessing=PRESETS["raw"]))
    np.testing.assert_array_equal(x[4, :, 0, 0], [40, 41, 42])


def test_limit_spreads_over_the_sorted_images(folder: Path) -> None:
    x = rows(open_data(str(folder), [wanted()], preprocessing=PRESETS["raw"], limit=2))
    np.testing.assert_array_equal(x[:, 0, 0, 0], [0, 20])


def test_images_need_a_preset(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs to know how the model wants them"):
        open_data(str(folder), [wanted()])


def test_a_broken_image_is_named(folder: Path) -> None:
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"3\.png: not a readable image"):
        list(open_data(str(folder), [wanted()], preprocessing=PRESETS["unit"]))


def test_images_for_two_inputs_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="images fit a model with one input"):
        open_data(str(folder), [wanted(), wanted("y")], preprocessing=PRESETS["unit"])


def test_an_open_image_size_asks_for_one(folder: Path) -> None:
    with pytest.raises(InputError, match="leaves the image size open"):
        open_data(str(folder), [wanted(shape=(None, 3, None, None))], preprocessing=PRESETS["unit"])


def test_without_pillow_the_error_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # what import sees where it is missing
    with pytest.raises(InputError, match=r"pip install qwrap\[images\]"):
        list(open_data(str(folder), [wanted()], preprocessing=PRESETS["unit"]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder `shared` beside the checkout")
def test_images_equal_what_a_published_model_was_evaluated_on(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("load", SHARED / "data" / "load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    folder = SHARED / "data" / "imagenet"
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file) if row["split"] == "calib"][:3]
    for i, name in enumerate(names):
        shutil.copyfile(folder / "images" / name, tmp_path / f"{i}.jpg")
    model = "squeezenet1_0_imagenet"
    settings = replace(PRESETS["caffe"], mean=(104.0, 117.0, 123.0), shorter=256)
    inputs = graph_inputs(load.model_path(model))
    (batch,) = open_data(str(tmp_path), inputs, preprocessing=settings)
    expected = np.concatenate([sample["data"] for sample, _ in islice(load.calib(model), 3)])
    np.testing.assert_array_equal(batch["data"], expected)


# --- preprocessing files


def test_a_json_file_varies_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"preset": "tf", "size": 32, "channels": "BGR"}))
    expected = Preprocessing(scale=1 / 127.5, mean=(1.0,), size=(32, 32), channels="BGR")
    assert read_preprocessing(str(path)) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_a_toml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('size = [8, 16]\nmean = 0.5\nresize = "shorter"\nshorter = 20\n')
    expected = Preprocessing(size=(8, 16), mean=(0.5,), resize="shorter", shorter=20)
    assert read_preprocessing(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "holds a list"),
        ('{"sized": 3}', "unknown keys sized"),
        ('{"preset": "vgg"}', "no preset 'vgg'"),
        ('{"resize": "stretch"}', "resize='stretch': choose one of"),
        ('{"std": 0}', "a divisor of 0"),
        ('{"mean": [1, 2]}', "give 1 or 3 numbers"),
        ('{"size": [1, 2, 3]}', "give 2 numbers"),
        ('{"size": 224, "shorter": 100}', "nothing to crop from"),
        ('{"scale": "x"}', "scale='x'"),
        ('{"mean": ["x"]}', "mean="),
    ],
)
def test_a_bad_preprocessing_file_is_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"p\.json: .*{message}"):
        read_preprocessing(str(path))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no preset or file 'vgg'; choose one of unit, tf"):
        read_preprocessing("vgg")


# --- functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    lines = (
        "import numpy as np",
        "def batches():",
        "    for i in range(6):",
        "        yield np.full((4, 2), i), 'label'",
        "def nothing(): return 3",
        "value = 3",
    )
    (tmp_path / "calibration_data.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "calibration_data", raising=False)
    return "calibration_data"


def test_batches_of_a_function_pass_as_they_are(module: str) -> None:
    batches = open_data(f"{module}:batches", [wanted()])
    assert [int(x[0, 0]) for x, _ in batches] == [*range(6)]
    assert len(list(batches)) == 6  # the function is called anew


def test_limit_ends_a_function_at_the_batch_that_reaches_it(module: str) -> None:
    assert len(list(open_data(f"{module}:batches", [wanted()], limit=9))) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module_here:batches", "No module named"),
        ("calibration_data:absent", "has no function 'absent'"),
        ("calibration_data:value", "is a int, not a function"),
        ("calibration_data:nothing", "returned a int; expected an iterable"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_wrong_function_is_explained(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(open_data(source, [wanted()]))


def test_a_function_takes_no_preprocessing(module: str) -> None:
    with pytest.raises(ConfigError, match="take no preprocessing"):
        open_data(f"{module}:batches", [wanted()], preprocessing=PRESETS["unit"])


# --- what the path names


def test_a_missing_path_is_named() -> None:
    with pytest.raises(InputError, match="absent: no such file or folder"):
        open_data("absent", [wanted()])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"d\.csv: a \.csv file; give"):
        open_data(str(tmp_path / "d.csv"), [wanted()])


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"holds \.csv; expected .*\.npz"):
        open_data(str(tmp_path), [wanted()])


def test_a_folder_of_both_kinds_is_refused(folder: Path) -> None:
    np.save(folder / "d.npy", np.zeros(3))
    with pytest.raises(InputError, match="5 images and 1 array files"):
        open_data(str(folder), [wanted()])


def test_a_limit_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit=0: at least one sample"):
        open_data("absent", [wanted()], limit=0)
