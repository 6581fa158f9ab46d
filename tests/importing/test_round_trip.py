"""Export, import, export: the file comes back, and so does what it computes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper

import qwrap


def returned(path: Path, **settings: object) -> tuple[qwrap.WrappedModel, bytes]:
    """The model that a file becomes, and the file that it becomes."""
    model = qwrap.load(path, **settings).eval()
    back = path.with_suffix(".back.onnx")
    qwrap.export(model, back)
    return model, back.read_bytes()


TYPES = ("uint8", "int8", "uint16", "int16", "uint4", "int4", "uint2", "int2", "float8e4m3fn")


PAIRS = [*(("uint8", t) for t in TYPES), ("int16", "int4"), ("float8e5m2", "int8"), ("uint4",) * 2]


@pytest.mark.parametrize(("activation", "weight"), PAIRS)
@pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning")  # types that have no kernels
def test_a_file_that_was_not_trained_comes_back_byte_for_byte(
    small, quantized: Callable, activation: str, weight: str
) -> None:
    config = qwrap.QConfig(activation=activation, weight=weight, scope="kernels")
    made = quantized(small.convs(), config=config)
    model, back = returned(made.path)
    assert back == made.path.read_bytes()
    x = torch.from_numpy(made.batches[0])
    with torch.no_grad():
        assert torch.equal(model(x), made.model(x))


def test_the_exact_simulation_is_that_of_the_model_it_came_from(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    model, _ = returned(made.path)
    x = torch.from_numpy(made.batches[0])
    with torch.no_grad(), qwrap.exact(model):
        assert np.array_equal(model(x).numpy(), small.run(made.path, made.batches[0])[0])
    assert {k: n.role for k, n in model.plan.nodes.items()} == {
        k: n.role for k, n in made.model.plan.nodes.items()
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_goes_back_to_the_same_file(small, quantized: Callable, copied: Callable) -> None:
    made = quantized(small.convs())
    model = copied(qwrap.load(made.path))
    back = made.path.with_suffix(".copy.onnx")
    qwrap.export(model, back)
    assert back.read_bytes() == made.path.read_bytes()


def train(model: qwrap.WrappedModel, x: np.ndarray) -> None:
    """One step of all that can be trained."""
    model.train()
    optimizer = torch.optim.SGD(qwrap.param_groups(model), lr=0.01)
    model(torch.from_numpy(x)).square().mean().backward()
    optimizer.step()
    model.eval()


def test_what_was_trained_is_all_that_changes_in_the_file(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    model = qwrap.load(made.path)
    train(model, made.batches[0])
    qwrap.export(model, made.path.with_suffix(".trained.onnx"))
    before, after = made.file(), onnx.load(made.path.with_suffix(".trained.onnx"))
    old = {tensor.name: tensor for tensor in before.graph.initializer}
    new = {tensor.name: tensor for tensor in after.graph.initializer}
    assert list(old) == list(new)
    assert all(name.endswith(("_scale", "_quantized")) for name in old if old[name] != new[name])
    del before.graph.initializer[:], after.graph.initializer[:]
    assert before == after
    path = made.path.with_suffix(".trained.onnx")
    report = qwrap.verify(model, path, made.batches, progress=False)
    assert report.specification.differing == report.deployed.differing == 0


def test_prepare_starts_afresh_from_the_float_weights(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    model = qwrap.load(made.path)
    qwrap.prepare(model, qwrap.QConfig(activation="int8", scope="kernels"))
    qwrap.calibrate(model, made.batches, progress=False)
    path = made.path.with_suffix(".again.onnx")
    qwrap.export(model, path)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds["x_zero_point"] == onnx.TensorProto.INT8


def test_nodes_are_computed_as_they_stand_on_request(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    model = qwrap.load(made.path, quantized="nodes")
    assert model.plan is None
    with pytest.raises(qwrap.QwrapError, match="quantized='stubs': choose one of"):
        qwrap.load(made.path, quantized="stubs")


def test_another_type_to_compute_in_is_refused(small, quantized: Callable) -> None:
    with pytest.raises(qwrap.QwrapError, match="load it without dtype, or with quantized='nodes'"):
        qwrap.load(quantized(small.convs()).path, dtype=torch.float64)


def test_external_data_comes_back_too(small, quantized: Callable, tmp_path: Path) -> None:
    made = quantized(small.convs())
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    source, target = (tmp_path / folder / "m.onnx" for folder in ("before", "after"))
    onnx.save(
        onnx.load(made.path),
        source,
        save_as_external_data=True,
        location="m.onnx.data",
        size_threshold=0,
    )
    model = qwrap.load(source)
    qwrap.export(model, target)
    assert target.read_bytes() == source.read_bytes()
    data = [path.with_suffix(".onnx.data").read_bytes() for path in (source, target)]
    assert data[0] == data[1]


@pytest.mark.parametrize("kind", ["message", "onnx_ir"])
def test_models_in_memory_are_imported(small, quantized: Callable, kind: str) -> None:
    made = quantized(small.convs())
    source = onnx.load(made.path) if kind == "message" else onnx_ir.load(made.path)
    model, back = qwrap.load(source), made.path.with_suffix(".back.onnx")
    qwrap.export(model, back)
    assert onnx.load(back).graph == onnx.load(made.path).graph


def test_what_was_trained_is_in_the_state(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    model, other = qwrap.load(made.path), qwrap.load(made.path)
    train(model, made.batches[0])
    other.load_state_dict(model.state_dict())
    files = [made.path.with_suffix(f".{name}.onnx") for name in ("one", "two")]
    for trained, path in zip((model, other), files, strict=True):
        qwrap.export(trained, path)
    assert files[0].read_bytes() == files[1].read_bytes() != made.path.read_bytes()


def test_a_file_that_quantizes_what_cannot_be_calibrated_says_so(
    small, quantized: Callable
) -> None:
    made = quantized(small.convs())
    model = qwrap.load(made.path)
    masks = [np.full_like(batch, np.finfo(np.float32).min) for batch in made.batches]
    with pytest.raises(qwrap.QwrapError, match="The file that the model came from quantizes them"):
        qwrap.calibrate(model, masks, progress=False)


def test_what_is_known_of_a_tensor_wins_over_the_file(small, quantized: Callable) -> None:
    made = quantized(small.convs())
    config = qwrap.QConfig()
    config.set("x", scale=0.125, zero_point=100)
    config.set("b", training="fixed")
    model = qwrap.load(made.path, config=config)
    assert model.plan.tensors["b"].training == "fixed" != model.plan.tensors["y"].training
    path = made.path.with_suffix(".known.onnx")
    qwrap.export(model, path)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert (tensors["x_scale"], tensors["x_zero_point"]) == (np.float32(0.125), 100)


@pytest.mark.parametrize("copied", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m))])
def test_large_weights_come_back(small, quantized: Callable, copied: Callable) -> None:
    source = small.build("y = MatMul(x, w)", {"w": (100, 70)}, "float[N,100] x", "float[N,70] y")
    made = quantized(source, small.batches(2, (8, 100)))
    model = copied(qwrap.load(made.path))
    back, trained = (made.path.with_suffix(f".{name}.onnx") for name in ("back", "trained"))
    qwrap.export(model, back)
    assert back.read_bytes() == made.path.read_bytes()
    train(model, made.batches[0])
    with torch.no_grad():
        model.get_parameter(next(k for k, v in model.tensor_names.items() if v == "w"))[0] += 0.5
    qwrap.export(model, trained)
    report = qwrap.verify(model, trained, made.batches, progress=False)
    assert report.specification.differing == report.deployed.differing == 0
    before, after = (codes_of(onnx.load(path), "w_quantized") for path in (back, trained))
    assert (before[0] != after[0]).any()
    assert np.array_equal(before[1:], after[1:])


def codes_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
