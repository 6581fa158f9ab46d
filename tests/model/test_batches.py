from collections import UserDict

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader
from torch.utils.data import DataLoader, TensorDataset

from qwrap.errors import InputError
from qwrap.model import WrappedModel, load
from qwrap.model.batches import iterate, to_inputs


def model_of(**inputs: int) -> WrappedModel:
    """A model whose graph inputs, of shape [N, 3], are summed after a cast to float."""
    nodes = [
        helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT) for name in inputs
    ]
    nodes.append(helper.make_node("Sum", [f"{name}_f" for name in inputs], ["y"]))
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info(name, kind, ["N", 3]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.fixture
def images() -> WrappedModel:
    return model_of(image=TensorProto.FLOAT)


@pytest.fixture
def tokens() -> WrappedModel:
    return model_of(ids=TensorProto.INT64, mask=TensorProto.INT64)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
IDS, MASK = np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)


def read_only() -> np.ndarray:
    array = X.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "batch",
    [
        torch.from_numpy(X),
        X,
        X.astype(np.float64),
        X.astype(np.float16),
        X.astype(">f4"),
        np.asfortranarray(X),
        X[::-1][::-1],
        np.repeat(X, 2, axis=1)[:, ::2],
        read_only(),
        X.tolist(),
        (X,),
        (X, np.array([1, 0])),
        [torch.from_numpy(X), torch.tensor([1, 0])],
        {"image": X},
        {"image": X.tolist(), "label": "cat"},
        UserDict(image=X),
        torch.from_numpy(X).requires_grad_(),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_kind_of_batch_gives_the_same_inputs(images: WrappedModel, batch: object) -> None:
    (item,) = to_inputs(batch, images).items()
    assert item[0] == "image"
    assert item[1].dtype == torch.float32
    assert not item[1].requires_grad
    assert torch.equal(item[1], torch.from_numpy(X))


@pytest.mark.parametrize(
    "batch",
    [
        (IDS, MASK),
        (IDS, MASK, np.zeros(2)),
        [torch.from_numpy(IDS), MASK],
        [IDS.tolist(), MASK.tolist()],
        {"mask": MASK, "labels": 3, "ids": IDS},
    ],
)
def test_several_inputs_come_in_graph_order_or_by_name(tokens: WrappedModel, batch: object) -> None:
    inputs = to_inputs(batch, tokens)
    assert list(inputs) == ["ids", "mask"]
    assert torch.equal(inputs["ids"], torch.from_numpy(IDS))
    assert torch.equal(inputs["mask"], torch.from_numpy(MASK))


def test_a_reversed_array_is_taken_as_it_reads(images: WrappedModel) -> None:
    assert torch.equal(to_inputs(X[:, ::-1], images)["image"], torch.from_numpy(X).flip(1))


def test_inputs_run(tokens: WrappedModel) -> None:
    result = tokens(**to_inputs((IDS, MASK), tokens))
    assert torch.equal(result, torch.from_numpy(IDS + MASK).float())


def test_a_data_loader_works_as_it_is(images: WrappedModel) -> None:
    data = TensorDataset(torch.randn(10, 3), torch.arange(10))
    found = [b["image"] for b in iterate(DataLoader(data, batch_size=4), images)]
    assert [len(b) for b in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), data.tensors[0])


class Reader(CalibrationDataReader):
    def __init__(self, count: int) -> None:
        self.left = count

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.left -= 1
        return None if self.left < 0 else {"image": X + self.left}


def test_a_calibration_data_reader_works_as_it_is(images: WrappedModel) -> None:
    found = [float(b["image"][0, 0]) for b in iterate(Reader(3), images)]
    assert found == [2.0, 1.0, 0.0]


def test_batches_are_taken_one_at_a_time(images: WrappedModel) -> None:
    taken = []

    def source():
        for i in range(5):
            taken.append(i)
            yield X

    next(iterate(source(), images))
    assert taken == [0]


def test_a_graph_serves_as_well_as_a_model(images: WrappedModel) -> None:
    assert torch.equal(to_inputs(X, images.graph)["image"], torch.from_numpy(X))


@pytest.mark.parametrize("batches", [[], iter(()), Reader(0)])
def test_no_batches(images: WrappedModel, batches: object) -> None:
    with pytest.raises(InputError, match="no batches: the data is empty"):
        list(iterate(batches, images))


@pytest.mark.parametrize("batches", [X, torch.from_numpy(X), {"image": X}, "folder", 3, None])
def test_one_batch_is_not_batches(images: WrappedModel, batches: object) -> None:
    with pytest.raises(InputError, match=f"batches is a {type(batches).__name__}; give an iterabl"):
        list(iterate(batches, images))


def test_an_error_names_the_batch(images: WrappedModel) -> None:
    with pytest.raises(InputError, match=r"batch 2: input 'image': expected 2 dimensions"):
        list(iterate([X, X, X[0]], images))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(images: WrappedModel, bad: float) -> None:
    spoilt = X.copy()
    spoilt[0, 1] = spoilt[1, 2] = bad
    with pytest.raises(InputError, match=r"batch 1: input 'image': 2 of 6 values are NaN or inf"):
        list(iterate([X, spoilt], images))


def test_a_float64_that_overflows_float32_is_not_finite(images: WrappedModel) -> None:
    with pytest.raises(InputError, match="1 of 3 values are NaN or infinite"):
        to_inputs(np.array([[1e300, 0, 0]]), images)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": IDS, "Mask": MASK}, r"graph inputs \['mask'\] are missing; .* \['Mask', 'ids'\]"),
        ((IDS,), r"got 1 inputs; the graph has 2: \['ids', 'mask'\]"),
        (IDS, r"got 1 inputs; the graph has 2"),
        ((IDS, MASK.astype(np.int32)), r"input 'mask': expected torch.int64, got torch.int32"),
        ((IDS, MASK.astype(float)), r"input 'mask': expected torch.int64, got torch.float64"),
        ((IDS, MASK[0]), r"input 'mask': expected 2 dimensions \['N', 3\], got shape \[3\]"),
        ((IDS, "text"), r"input 'mask': cannot make a tensor of a str"),
        ((IDS, [[1, 2], [3]]), r"input 'mask': cannot make a tensor of a list"),
        ((IDS, object()), r"input 'mask': cannot make a tensor of a object"),
    ],
)
def test_a_batch_that_does_not_fit(tokens: WrappedModel, batch: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_inputs(batch, tokens)


def test_integers_are_not_floats(images: WrappedModel) -> None:
    with pytest.raises(InputError, match=r"expected torch\.float32, got torch\.uint8; convert it"):
        to_inputs(np.zeros((2, 3), np.uint8), images)
