"""A substitute computes its node in every program, from constants that it makes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from qwrap.errors import ModelError
from qwrap.model import Program, UsePoint, WrappedModel, load
from qwrap.model.materialize import materialize
from qwrap.model.substitute import Substitute


class Scaled(Substitute):
    """Stores the second input divided by a parameter."""

    indices = (1,)

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))

    def forward(
        self, function: Callable[..., Any], taps: Sequence[Any], *inputs: Any, **keywords: Any
    ) -> Any:
        x, stored = inputs
        made = self.made(1, stored)
        return function(x, made if taps[0] is None else taps[0](made), **keywords)

    def made(self, index: int, stored: Tensor) -> Tensor:
        assert index == 1
        return stored * self.factor

    def unmade(self, index: int, wanted: Tensor) -> Tensor:
        assert index == 1
        return wanted / self.factor


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.fixture
def model(build: Callable[..., onnx.ModelProto]) -> WrappedModel:
    """y = x @ w with w the identity, of which half is stored."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "/fc/Gemm", alpha=1.0)]
    model = load(build(nodes, {"x": ["n", 2]}, ["y"], {"w": np.eye(2, dtype=np.float32)}))
    with torch.no_grad():
        model.stored("w").mul_(0.5)
    model.put_substitutes({"/fc/Gemm": Scaled(2.0)})
    return model


X = torch.tensor([[1.0, 2.0]])


def test_it_computes_the_node_in_all_programs(model: WrappedModel) -> None:
    assert model(X).tolist() == [[1, 2]]
    with model.running(Program()):
        assert model(X).tolist() == [[1, 2]]


def test_taps_see_what_it_makes(model: WrappedModel) -> None:
    model.attach({UsePoint("/fc/Gemm", 1): Plus()})
    assert model(X).tolist() == [[1 + 3, 2 + 3]]
    with model.running(Program()):
        assert model(X).tolist() == [[1, 2]]


def test_a_kernel_in_its_place_reads_what_it_makes(model: WrappedModel) -> None:
    seen: list[Tensor] = []
    kernels = {"/fc/Gemm": lambda x, w: seen.append(w) or x}
    with model.running(Program(kernels=kernels)):
        model(X)
    assert seen[0].tolist() == [[1, 0], [0, 1]]


def test_the_graph_has_what_it_makes(model: WrappedModel) -> None:
    assert model.deployed("w").tolist() == [[1, 0], [0, 1]]
    assert model.stored("w").tolist() == [[0.5, 0], [0, 0.5]]
    with torch.no_grad():
        model.substitute("/fc/Gemm").factor.fill_(6.0)
    tensor = materialize(model).graph.initializers["w"].const_value
    assert tensor.numpy().tolist() == [[3, 0], [0, 3]]


def test_a_constant_can_be_written_through_it(model: WrappedModel) -> None:
    model.assign("w", torch.full((2, 2), 4.0))
    assert model.stored("w").tolist() == [[2, 2], [2, 2]]
    assert model.deployed("w").tolist() == [[4, 4], [4, 4]]
    with pytest.raises(ModelError, match=r"'u'.* stores no such initialiser"):
        model.assign("u", torch.zeros(1))


def test_it_is_a_submodule_that_learns_and_is_copied(model: WrappedModel) -> None:
    model(X).sum().backward()
    assert model.substitute("/fc/Gemm").factor.grad.item() == 1.5
    (name,) = [name for name, _ in model.named_parameters() if "factor" in name]
    assert name == "fc.substitutes./fc/Gemm.factor"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(X).tolist() == [[1, 2]]
        assert other.substitute("/fc/Gemm") is not model.substitute("/fc/Gemm")


def test_without_it_what_is_stored_counts_again(model: WrappedModel) -> None:
    model.put_substitutes({})
    assert model(X).tolist() == [[0.5, 1]]
    assert model.deployed("w") is model.stored("w")
    assert not any("factor" in name for name in model.state_dict())
