"""The shared models, quantized, exported, imported, exported."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwrap

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
NAMES = ["resnet20_cifar10", "mnist_cntk", "super_resolution", "silero_vad", "stories260k"]
pytestmark = [
    # The image reader of the shared data leaves files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning"),
]


@pytest.fixture(scope="module")
def samples() -> Any:
    if not (SHARED / "data" / "load.py").exists():
        pytest.skip("needs the folder of shared models and data beside the checkout")
    sys.path.insert(0, str(SHARED / "data"))
    return import_module("load")


@pytest.mark.parametrize("name", NAMES)
def test_a_real_network_comes_back_byte_for_byte(
    name: str, samples: Any, imported: Any, tmp_path: Path
) -> None:
    feeds = [
        {key: torch.from_numpy(np.array(array)) for key, array in feed.items()}
        for feed, _ in samples.val(name, 2)
    ]
    model = qwrap.load(samples.model_path(name)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", method="minmax"))
    qwrap.calibrate(model, feeds, progress=False)
    qwrap.export(model, tmp_path / "made.onnx")
    back = imported.load(tmp_path / "made.onnx")
    assert not back.plan.notes
    for program in (None, qwrap.exact):
        for mine, theirs in zip(
            *(outputs(m, feeds[0], program) for m in (back, model)), strict=True
        ):
            assert torch.equal(mine, theirs)


def outputs(model: qwrap.WrappedModel, feed: dict[str, Any], program: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        if program is None:
            result = model(**feed)
        else:
            with program(model):
                result = model(**feed)
    return result if isinstance(result, tuple) else (result,)


def test_a_real_network_of_several_types_comes_back_and_is_trained(
    samples: Any, imported: Any, tmp_path: Path
) -> None:
    name = "resnet20_cifar10"
    feeds = [
        {key: torch.from_numpy(np.array(array)) for key, array in feed.items()}
        for feed, _ in samples.val(name, 2)
    ]
    model = qwrap.load(samples.model_path(name)).eval()
    config = qwrap.QConfig(scope="kernels", method="minmax")
    layers = [key for key, node in model.graph.nodes.items() if node.op_type == "Conv"]
    config.set(layers[3::4], activation="uint16")
    plan = qwrap.prepare(model, config)
    qwrap.calibrate(model, feeds, progress=False)
    qwrap.export(model, tmp_path / "made.onnx")
    back = imported.load(tmp_path / "made.onnx", config=imported.learning())
    kept = [
        {(key, c.key, c.spec, frozenset(c.consumers), c.outputs) for key, c in p.conversions()}
        for p in (back.plan, plan)
    ]
    assert kept[0] == kept[1] != set()
    for mine, theirs in zip(*(outputs(m, feeds[0], None) for m in (back, model)), strict=True):
        assert torch.equal(mine, theirs)
    imported.train(back, *(feed.numpy() for feed in feeds[0].values()))
    trained = tmp_path / "trained.onnx"
    qwrap.export(back, trained)
    report = qwrap.verify(back, trained, feeds, isolated=True, progress=False)
    for tensor in report.specification.tensors:
        # Sums of products in another order move codes at ties: few of 8 bits, more of 16.
        assert tensor.worst_step <= 1
        assert tensor.differing <= (0.05 if tensor.dtype == "uint16" else 0.001) * tensor.elements
