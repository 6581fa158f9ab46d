"""The real models are modules like any other: they load fast, train, pickle, compile, export."""

import pickle
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qwrap.model import WrappedModel, load

NAMES = [
    "squeezenet1_0_imagenet",
    "mobilenetv2_cifar10_128",
    "resnet20_cifar10",
    "mnist_cntk",
    "nanodet_m_320",
    "espnetv2_s2_voc_256",
    "super_resolution",
    "ppocr_en_number_rec",
    "silero_vad",
    "minilm_l6",
    "stories260k",
]
CAPTURABLE = [name for name in NAMES if name != "silero_vad"]  # its branches depend on data
# The image reader of the shared data leaves files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def inputs(name: str, samples: Any) -> dict[str, Tensor]:
    (feed, _), *_ = samples.val(name, 1)
    return {key: torch.from_numpy(array.copy()) for key, array in feed.items()}


def run(module: Any, feed: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = module(**feed)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", NAMES)
def test_loading_takes_less_than_two_seconds(name: str, samples: Any) -> None:
    start = time.process_time()
    load(samples.model_path(name))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_reaches_all_parameters_that_run(name: str, samples: Any) -> None:
    model, feed = load(samples.model_path(name)), inputs(name, samples)
    result = model(**feed)
    tensors = result if isinstance(result, tuple) else (result,)
    loss = torch.stack([t.square().mean() for t in tensors if t.is_floating_point()]).sum()
    loss.backward()
    reached = [p for p in model.parameters() if p.grad is not None]
    # The other half of silero's parameters are in the branch for another sampling rate.
    assert len(reached) == len(list(model.parameters())) // (2 if name == "silero_vad" else 1)
    assert all(p.grad.isfinite().all() for p in reached)
    before = [p.detach().clone() for p in reached]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, reached, strict=True))


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_computes_the_same(name: str, samples: Any) -> None:
    model, feed = load(samples.model_path(name)), inputs(name, samples)
    other: WrappedModel = pickle.loads(pickle.dumps(model))
    assert_same(run(other, feed), run(model, feed))


@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_forward_waits_for_no_device(name: str, samples: Any) -> None:
    # Tensors on "meta" have no data: reading a number back from the device raises.
    model = load(samples.model_path(name)).eval().to("meta")
    feed = {key: tensor.to("meta") for key, tensor in inputs(name, samples).items()}
    assert all(tensor.is_meta for tensor in run(model, feed))


@pytest.mark.parametrize("name", CAPTURABLE)
def test_it_compiles_into_one_graph(name: str, samples: Any) -> None:
    torch._dynamo.reset()
    model, feed = load(samples.model_path(name)).eval(), inputs(name, samples)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    assert_same(run(compiled, feed), run(model, feed))


@pytest.mark.parametrize("name", CAPTURABLE)
def test_it_exports_as_a_program(name: str, samples: Any) -> None:
    model, feed = load(samples.model_path(name)).eval(), inputs(name, samples)
    arguments = tuple(feed[key] for key in model.input_names)
    with torch.no_grad():
        program = torch.export.export(model, arguments).module()
        result = program(*arguments)
    assert_same(list(result) if isinstance(result, tuple) else [result], run(model, feed))
