"""Which measure fits which output, and what it is."""

from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import InputError
from qwrap.mixed.loss.outputs import Output, divergence, outputs_of_graph

IMAGE = "float[N,3,8,8] x"


def kinds(small: Any, nodes: str, weights: Any, outputs: str, measure: Any = "kl") -> Any:
    proto = small.build(nodes, weights, outputs=outputs)
    model = qwrap.load(proto).eval()
    with torch.no_grad():
        result = model(torch.ones(2, 3, 8, 8))
    wanted = list(result) if isinstance(result, tuple) else [result]
    return outputs_of_graph(model.graph, wanted, measure)


@pytest.mark.parametrize(
    ("nodes", "weights", "outputs", "kind", "axis"),
    [
        ("f = Flatten(x) y = Gemm(f, w)", {"w": (192, 5)}, "float[N,M] y", "kl", -1),
        ("f = Flatten(x) m = MatMul(f, w) y = Add(b, m)", {"w": (192, 5), "b": (5,)},
         "float[N,M] y", "kl", -1),
        ("f = Flatten(x) y = Gemm(f, w)", {"w": (192, 1)}, "float[N,M] y", "error", -1),
        ("f = Flatten(x) m = MatMul(f, w) y = Sigmoid(m)", {"w": (192, 5)}, "float[N,M] y",
         "error", -1),
        ("y = Conv(x, w)", {"w": (5, 3, 1, 1)}, "float[N,M,H,W] y", "kl", 1),
        ("y = Conv(x, w)", {"w": (3, 3, 1, 1)}, "float[N,M,H,W] y", "error", -1),
        ("c = Conv(x, w) y = Relu(c)", {"w": (5, 3, 1, 1)}, "float[N,M,H,W] y", "error", -1),
        ("c = Conv(x, w) y = Softmax<axis=1>(c)", {"w": (2, 3, 1, 1)}, "float[N,M,H,W] y", "kl", 1),
        ("c = Conv(x, w) y = ArgMax<axis=1>(c)", {"w": (5, 3, 1, 1)}, "int64[N,M,H,W] y",
         "differing", -1),
    ],
)  # fmt: skip
def test_the_layer_that_made_an_output_tells_what_it_is(
    small: Any, nodes: str, weights: Any, outputs: str, kind: str, axis: int
) -> None:
    (found,) = kinds(small, nodes, weights, outputs)
    assert (found.kind, found.axis) == (kind, axis)


def test_the_user_says_what_counts_and_how(small: Any) -> None:
    found = kinds(
        small,
        "y = Conv(x, w) z = Relu(y)",
        {"w": (3, 3, 1, 1)},
        "float[N,M,H,W] y, float[N,M,H,W] z",
        {"z": "kl"},
    )
    assert [(o.name, o.index, o.kind, o.axis) for o in found] == [("z", 1, "kl", 1)]


def distance(output: Output, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    return output.distance(found, output.reference(wanted))


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_that_of_torch_distributions() -> None:
    a, b = logits(6, 5).double(), logits(6, 5, seed=1).double()
    p, q = (torch.distributions.Categorical(logits=x) for x in (b, a))
    wanted = torch.distributions.kl_divergence(p, q)
    found = divergence(a - b, b.softmax(-1))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_a_tiny_divergence_is_half_the_variance_of_the_moves() -> None:
    p, moves = logits(6, 5).double().softmax(-1), 1e-7 * logits(6, 5, seed=1).double()
    variance = (p * moves**2).sum(-1) - (p * moves).sum(-1) ** 2
    # what is left out is of third order; as a difference of logarithms it would be noise
    assert torch.allclose(divergence(moves, p), variance / 2, rtol=1e-5, atol=0)


def test_classes_that_are_masked_do_not_count() -> None:
    a, b = logits(6, 5).double(), logits(6, 5, seed=1).double()
    for mask in (-1e38, -np.inf):
        masked, other = b.clone(), a.clone()
        masked[:, 2], other[:, 2] = mask, 7.0
        keep = [0, 1, 3, 4]
        output = Output("y", 0, "kl")
        found = output.distance(other, output.reference(masked))
        wanted = output.distance(a[:, keep], output.reference(b[:, keep]))
        assert found == pytest.approx(wanted, rel=1e-12)


def test_distance_over_scale_is_the_measure() -> None:
    a, b = logits(2, 5, 3, 3), logits(2, 5, 3, 3, seed=1)
    error, scale = distance(Output("y", 0, "error"), a, b)
    assert error / scale == pytest.approx(float((a - b).square().sum() / b.square().sum()))
    error, scale = distance(Output("y", 0, "kl", 1), a, b)
    p, q = (torch.distributions.Categorical(logits=x.movedim(1, -1)) for x in (b, a))
    assert scale == 18
    wanted = float(torch.distributions.kl_divergence(p, q).mean())
    assert error / scale == pytest.approx(wanted, rel=1e-5)  # torch's is float32 here
    ints = torch.tensor([[1, 2], [3, 4]])
    assert distance(Output("y", 0, "differing"), ints, ints * torch.tensor([1, 0])) == (2.0, 4.0)


def test_a_softmax_of_old_flattens_what_follows_its_axis() -> None:
    a, b = logits(2, 3, 4), logits(2, 3, 4, seed=1)
    p, q = (x.flatten(1).softmax(-1) for x in (b, a))
    output = Output("y", 0, "kl", 1, is_probability=True, is_flat=True)
    error, scale = distance(output, q.reshape(2, 3, 4), p.reshape(2, 3, 4))
    assert scale == 2
    # a millionth is added to each probability, so that zeros have a logarithm
    assert error == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_a_probability_of_zero_has_a_finite_divergence() -> None:
    output = Output("y", 0, "kl", -1, is_probability=True)
    error, _ = distance(output, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.999, 0.001]]))
    assert 0 < error < 0.01


def test_shapes_that_depend_on_values_count_as_all_wrong() -> None:
    for kind in ("kl", "error", "differing"):
        error, scale = distance(Output("y", 0, kind), torch.ones(3, 2), torch.ones(2, 2))
        assert error == scale > 0


def test_values_that_become_nan_are_refused() -> None:
    nan = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(InputError, match="output 'y' has become NaN by quantization"):
        distance(Output("y", 0, "error"), nan, torch.ones(1, 2))
    assert distance(Output("y", 0, "error"), nan, nan)[0] == 0
