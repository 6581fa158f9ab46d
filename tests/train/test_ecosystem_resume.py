"""Training that was interrupted and resumed equals training that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwrap
from qwrap.model.extra_state import from_tensor
from qwrap.quant.prepare import stubs
from qwrap.quant.stubs import Stub

STEPS, STOP = 6, 3
POWERS = {
    "activation": qwrap.QuantSpec(dtype="uint8", symmetric=False, power_of_two=True),
    "weight": qwrap.QuantSpec(dtype="int8", power_of_two=True),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"training": "fixed"},
    "follow": {"training": "follow"},
    "lsq": {"training": "lsq"},
    "lsq+": {"training": "lsq+"},
    "pact": {"training": "pact"},
    "tqt": {"training": "tqt", **POWERS},
    "4 bits": {"activation": "uint4", "weight": "int4", "training": "lsq+", "method": "minmax"},
}


def in_float(stub: Stub) -> None:
    stub.mode = "float"


def not_learning(stub: Stub) -> None:
    stub.learning = False


def not_following(stub: Stub) -> None:
    stub.following = False


CHANGES: dict[str, Callable[[Stub], None]] = {
    "in float": in_float,
    "not learning": not_learning,
    "not following": not_following,
}


@dataclass
class Run:
    """A model in training, and what else has a state."""

    model: qwrap.WrappedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(4, 3, 8, 8)  # from the generator, whose state is saved too
            self.optimizer.zero_grad()
            (self.model(x) - x.mean()).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self, path: Path) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        states = [part.state_dict() for part in parts]
        torch.save({"states": states, "rng": torch.get_rng_state()}, path)

    @classmethod
    def of(cls, model: qwrap.WrappedModel) -> Run:
        groups = qwrap.param_groups(model, lr=1e-2, scale_lr=1e-2, weight_decay=1e-3)
        optimizer = torch.optim.AdamW(groups)
        return cls(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))

    @classmethod
    def resumed(cls, model: qwrap.WrappedModel, path: Path) -> Run:
        """The model's state comes first: calibration may have left stubs out."""
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["states"][0])
        run = cls.of(model.train())
        run.optimizer.load_state_dict(saved["states"][1])
        run.scheduler.load_state_dict(saved["states"][2])
        torch.set_rng_state(saved["rng"])
        return run


def prepared(source: onnx.ModelProto, settings: dict[str, Any]) -> qwrap.WrappedModel:
    model = qwrap.load(source)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


def calibrated(source: onnx.ModelProto, settings: dict[str, Any], batches: list[Any]) -> Run:
    model = prepared(source, settings)
    qwrap.calibrate(model, batches, progress=False)
    torch.manual_seed(0)
    return Run.of(model.train())


def everything(model: qwrap.WrappedModel, folder: Path) -> dict[str, Any]:
    """What may not differ: the state, the effective scales, the exported file."""
    path = folder / "exported.onnx"
    qwrap.export(model, path)
    found: dict[str, Any] = {f"state {k}": v for k, v in model.state_dict().items()}
    for point, stub in stubs(model):
        found |= {f"{point} scale": stub.scale, f"{point} zero point": stub.zero_point}
    return found | {"file": path.read_bytes()}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def changed(run: Run, change: Callable[[Stub], None] | None) -> Run:
    """Every second stub is switched."""
    for number, (_, stub) in enumerate(stubs(run.model)):
        if change is not None and number % 2:
            change(stub)
    return run


def rest(source: onnx.ModelProto, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a new object comes to from the checkpoint."""
    resumed = Run.resumed(prepared(source, settings), folder / "checkpoint.pt")
    resumed.steps(STEPS - STOP)
    return everything(resumed.model, folder)


def both_ways(
    small,
    settings: dict[str, Any],
    folder: Path,
    change: Callable[[Stub], None] | None = None,
    source: onnx.ModelProto | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What uninterrupted and interrupted training come to."""
    source, batches = source or small.convs(), small.batches()
    whole = calibrated(source, settings, batches)
    before = {name: whole.model.get_parameter(name).clone() for name in ("w1", "w2")}
    whole.steps(STOP)
    changed(whole, change).steps(STEPS - STOP)
    assert all((whole.model.get_parameter(name) != before[name]).any() for name in before)
    part = calibrated(source, settings, batches)
    part.steps(STOP)
    changed(part, change).save(folder / "checkpoint.pt")
    torch.randn(7)  # what else draws from the generator is undone
    return everything(whole.model, folder), rest(source, settings, folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_training_equals_uninterrupted_training(small, tmp_path, name: str) -> None:
    assert_same(*both_ways(small, SETTINGS[name], tmp_path))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["follow", "lsq+"])
def test_modes_and_flags_are_resumed(small, tmp_path, name: str, change: str) -> None:
    assert_same(*both_ways(small, SETTINGS[name], tmp_path, CHANGES[change]))


def test_what_calibration_left_in_float_is_resumed(small, tmp_path) -> None:
    nodes = (
        "a = Conv(x, w1) m = ReduceMax<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, w2) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, w3) }> y = Relu(r)"
    )
    weights = {"w1": (6, 3, 1, 1), "w2": (4, 6, 1, 1), "w3": (4, 6, 1, 1)}
    source = small.build(nodes, weights | {"z": np.array(0, np.float32)})
    whole, resumed = both_ways(small, SETTINGS["lsq"], tmp_path, source=source)
    assert list(from_tensor(whole["state quantization._extra_state"])["without"]) == ["/q"]
    assert_same(resumed, whole)


def test_a_state_dict_holds_tensors_alone(small, tmp_path) -> None:
    """As safetensors wants it, which accelerate and the Trainer of transformers write."""
    run = calibrated(small.convs(), SETTINGS["lsq+"], small.batches())
    run.steps(2)
    state = run.model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    other = prepared(small.convs(), SETTINGS["lsq+"])
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(everything(other, tmp_path), everything(run.model, tmp_path))


def resume(_: int, source: bytes, folder: str) -> None:
    torch.set_num_threads(1)
    model = onnx.load_from_string(source)
    torch.save(rest(model, SETTINGS["lsq+"], Path(folder)), Path(folder) / "resumed.pt")


def test_a_new_process_resumes(small, tmp_path) -> None:
    """The file and the checkpoint say all; nothing else comes along."""
    whole, _ = both_ways(small, SETTINGS["lsq+"], tmp_path)
    source = small.convs().SerializeToString()
    torch.multiprocessing.spawn(resume, (source, str(tmp_path)))
    assert_same(torch.load(tmp_path / "resumed.pt", weights_only=False), whole)
