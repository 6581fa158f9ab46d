"""Moments of rows against those of all rows at once."""

import numpy as np
import torch

from qwrap.quant.row_moments import RowMoments


def correlated(shape: tuple[int, ...], count: int, sign: float = 1.0) -> list[torch.Tensor]:
    """Return batches that share one random number per sample, with a mean far from 0."""
    rng = np.random.default_rng(1)
    direction = np.where(rng.random(shape[1:]) < 0.5, 1, sign)
    batches = []
    for _ in range(count):
        common = rng.standard_normal((shape[0], *[1] * (len(shape) - 1))) * direction
        batches.append(common + 0.3 * rng.standard_normal(shape) + 1)
    return [torch.from_numpy(b.astype(np.float32)) for b in batches]


def test_moments_are_those_of_all_rows_in_constant_memory() -> None:
    batches = [b + 1000 for b in correlated((40, 6), 12)]
    moments, sizes = RowMoments(), set()
    for batch in batches:
        moments.add(batch[None])
        tensors = [v for v in vars(moments).values() if isinstance(v, torch.Tensor)]
        sizes.add(sum(t.numel() for t in tensors))
    rows = torch.cat(batches).double()
    assert sizes == {6 + 6 + 36}
    # The batches are float32 numbers of 1000: their sums are good to some 1e-4.
    torch.testing.assert_close(moments.mean[0], rows.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(moments.covariance[0], rows.T.cov(correction=0), rtol=0, atol=1e-3)


def test_a_constant_input_has_exactly_no_variance() -> None:
    moments = RowMoments()
    for batch in correlated((40, 3), 5):
        batch[:, 1] = 0.1
        moments.add(batch[None])
    assert (moments.covariance[0, 1] == 0).all()
    assert (moments.covariance[0, :, 1] == 0).all()
    assert moments.covariance[0, 0, 0] > 0


def test_the_second_moment_is_the_mean_product() -> None:
    moments, batches = RowMoments(), correlated((40, 6), 3)
    for batch in batches:
        moments.add(batch[None])
    moments.add(batches[0][:0][None])
    rows = torch.cat(batches).double()
    torch.testing.assert_close(moments.second[0], rows.T @ rows / len(rows), rtol=0, atol=1e-5)
