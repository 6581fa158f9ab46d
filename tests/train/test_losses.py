"""The losses against formulas written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qwrap.train.losses import cosine_distance, divergence, normalized_error

values = st.integers(-1600, 1600).map(lambda n: n / 16)  # whose squares do not underflow


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=6))
    drawn = [draw(arrays(np.float32, shape, elements=values)) for _ in range(2)]
    return torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])


@given(pairs())
def test_the_normalized_error_is_the_mean_square_over_the_variance(pair) -> None:
    student, teacher = (x.double().numpy() for x in pair)
    variance, power = teacher.var(), np.square(teacher).mean()
    scale = variance if variance > 1e-12 * power else power
    expected = np.square(student - teacher).mean() / (scale if scale > 0 else 1)
    # float32 sums of at most 216 terms; near-constant teachers cancel in their variance
    slack = 1e-4 + 1e-4 * power / max(scale, 1e-30)
    assert float(normalized_error(*pair)) == pytest.approx(expected, rel=slack, abs=1e-10)


def test_a_student_at_the_teachers_mean_has_an_error_of_one() -> None:
    teacher = torch.tensor([1.0, 2.0, 6.0])
    assert float(normalized_error(torch.full((3,), 3.0), teacher)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("constant", [0.0, 4.0])
def test_a_constant_teacher_is_held_against_its_power(constant: float) -> None:
    teacher = torch.full((5,), constant)
    expected = 4.0 / (constant**2 or 1)
    assert float(normalized_error(teacher + 2, teacher)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("masked", [torch.inf, -torch.inf, torch.nan, -3.4e38])
def test_what_the_teacher_masks_counts_nowhere(masked: float) -> None:
    student = torch.tensor([[1.0, 5.0, masked], [2.0, 2.0, masked]], requires_grad=True)
    teacher = torch.tensor([[1.0, 4.0, masked], [3.0, 2.0, masked]])
    for loss in (normalized_error, divergence):
        student.grad = None
        found, expected = loss(student, teacher), loss(student[:, :2], teacher[:, :2])
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        found.backward()
        assert student.grad is not None
        assert (student.grad[:, 2] == 0).all()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [normalized_error, divergence, cosine_distance])
def test_padding_changes_nothing(loss) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]) != 0
    expected = loss(student[mask], teacher[mask])
    assert torch.allclose(loss(student, teacher, mask), expected, rtol=1e-6)
    student[~mask] = 1e6
    assert torch.allclose(loss(student, teacher, mask), expected, rtol=1e-6)


@given(pairs(), st.floats(0.5, 4))
def test_the_divergence_is_that_of_kullback_and_leibler(pair, temperature: float) -> None:
    student, teacher = (x.double() / temperature for x in pair)
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    expected = (p * (teacher.log_softmax(-1) - q)).sum(-1).mean() * temperature**2
    found = divergence(*pair, temperature=temperature)
    # logits up to 200 in float32, whose last bit is 1.5e-5
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)


def test_a_pinned_divergence() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
    teacher, student = torch.tensor([3.0, 1.0]).log(), torch.zeros(2)
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert float(divergence(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_classes_may_lie_along_any_axis() -> None:
    student, teacher = torch.randn(2, 2, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    for loss in (divergence, cosine_distance):
        moved = [x.movedim(1, -1) for x in (student, teacher)]
        assert torch.equal(loss(student, teacher, axis=1), loss(*moved))


def test_the_cosine_distance_of_known_angles() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    expected = ((1 - 1) + (1 - 0.5**0.5) + (1 + 1)) / 3
    assert float(cosine_distance(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    teacher = torch.full((4, 40000), 3.0, dtype=torch.float16)
    teacher[::2] = 1.0
    error = normalized_error(teacher + 1, teacher)
    assert error.dtype == torch.float32
    assert float(error) == pytest.approx(1.0, rel=1e-6)  # both the error and the variance are 1
