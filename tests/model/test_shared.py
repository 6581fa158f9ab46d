"""The real models compute what onnxruntime computes, eager and compiled, and count as modules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from qwrap.model import load

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
# Largest difference over largest output. Both sides sum float32 products in an order of their
# own: the error is some 1e-7 a layer, and these networks have up to 60 of them.
TOLERANCE = 5e-6
# The image reader of the shared data leaves files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
Run = Callable[..., list[np.ndarray]]


@pytest.mark.parametrize("name", NAMES)
def test_output_equals_onnxruntime(name: str, samples: Any, run_ort: Run, run_qwrap: Run) -> None:
    model = load(samples.model_path(name))
    for feed, _ in samples.val(name, 2):
        for mine, theirs in zip(
            run_qwrap(model, feed), run_ort(samples.model_path(name), feed), strict=True
        ):
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            assert np.abs(mine - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["mnist_cntk", "silero_vad"])
def test_path_proto_and_ir_model_give_the_same_module(
    name: str, samples: Any, run_qwrap: Run
) -> None:
    path = samples.model_path(name)
    (feed, _), *_ = samples.val(name, 1)
    results = [run_qwrap(load(s), feed) for s in (path, onnx.load(path), ir.load(path))]
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_carries_the_model_into_a_fresh_one(name: str, samples: Any) -> None:
    model = load(samples.model_path(name))
    other = load(samples.model_path(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(model.state_dict(), strict=True)
    mine, theirs = model.state_dict(), other.state_dict()
    assert sorted(mine) == sorted(theirs) == sorted(model.tensor_names)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def larger(feed: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The same input at other dynamic sizes."""
    if name in ("minilm_l6", "stories260k"):
        return {k: np.concatenate([v[:, :7]] * 2) for k, v in feed.items()}
    if name == "ppocr_en_number_rec":
        return {k: np.concatenate([v, v[..., : v.shape[-1] // 2]], -1) for k, v in feed.items()}
    return {k: np.concatenate([v] * 2) for k, v in feed.items()}


@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "super_resolution", "minilm_l6", "stories260k"]
)
def test_one_compiled_graph_serves_all_sizes(name: str, samples: Any, run_qwrap: Run) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = load(samples.model_path(name)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    (feed, _), *_ = samples.val(name, 1)
    for inputs in (larger(feed, name), larger(larger(feed, name), name)):
        for a, b in zip(run_qwrap(compiled, inputs), run_qwrap(model, inputs), strict=True):
            np.testing.assert_array_equal(a, b)
    assert counter.frame_count == 1


def test_autograd_passes_through_a_compiled_model(samples: Any) -> None:
    torch._dynamo.reset()
    model = load(samples.model_path("resnet20_cifar10"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for a, b in zip(*gradients, strict=True):
        # aot_eager decomposes some operators, which rounds differently
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("minilm_l6", "m.encoder.layer.0.attention.self.query"),
        ("stories260k", "m.model.layers.0.self_attn.q_proj"),
        ("resnet20_cifar10", "layer1.0.conv1"),
    ],
)
def test_modules_have_the_paths_of_the_network_they_came_from(
    name: str, path: str, samples: Any
) -> None:
    model = load(samples.model_path(name))
    module = model.get_submodule(path)
    assert [p.dim() for p in module.parameters()]
