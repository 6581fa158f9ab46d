"""GPTQ against brute force, rounding to nearest, and onnxruntime's."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from onnxruntime.quantization.neural_compressor import weight_only as incumbent
from torch import Tensor

from qwrap.errors import ConfigError, QwrapWarning
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.gptq import gptq
from qwrap.nbits.hqq import hqq
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.split import dequantize
from qwrap.nbits.statistics import InputStatistics
from qwrap.quant.unfold import Unfold

pytestmark = pytest.mark.ort(296, "G4")

INPUTS, OUTPUTS = 256, 96
plain = partial(gptq, act_order=False, search=False)  # what is optional is asked for


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, inputs: int = INPUTS, seed: int = 1) -> Tensor:
    """Inputs of unlike power that share what a quarter as many numbers cause."""
    mixing = drawn(inputs // 4, inputs) * torch.linspace(0.1, 2, inputs)
    return drawn(rows, inputs // 4, seed=seed) @ mixing / 8 + 0.2 * drawn(rows, inputs, seed=9)


def statistics_of(*batches: Tensor) -> InputStatistics:
    statistics = InputStatistics()
    for batch in batches:
        statistics.add(batch)
    return statistics


SEEN = statistics_of(correlated(2000))
UNRELATED = statistics_of(torch.eye(INPUTS))


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (weight - rounded).mT).square().sum() / (x @ weight.mT).square().sum())


def held_back(weight: Tensor, blocks: Blocks) -> float:
    return output_error(weight, dequantize(blocks), correlated(1000, seed=2))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 128, 0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outputs_on_unseen_data_come_closer_than_rounded_to_nearest(
    bits: int, size: int, symmetric: bool
) -> None:
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(bits, size, symmetric)
    nearest = held_back(weight, round_to_nearest(weight, form))
    without_data = held_back(weight, hqq(weight, form))
    for act_order in (False, True):
        # Two bits, one after another: scales then follow weights that errors have blown up.
        search = bits == 2
        own = held_back(weight, plain(weight, form, SEEN, act_order=act_order, search=search))
        assert own < 0.6 * min(nearest, without_data)


def test_onnxruntimes_is_rounding_to_nearest() -> None:
    """Its compensation multiplies zeros: with correlated inputs it does what it does without."""
    weight, x = drawn(OUTPUTS, INPUTS), correlated(2000).double().numpy()
    found = [
        incumbent.gptq(weight.t().double().numpy().copy(), h, group_size=32)
        for h in (2 * x.T @ x / len(x), np.eye(INPUTS))
    ]
    np.testing.assert_array_equal(*found)
    theirs = torch.from_numpy(found[0].T.copy()).float()
    own = held_back(weight, plain(weight, BlockFormat(4, 32), SEEN))
    assert own < 0.5 * output_error(weight, theirs, correlated(1000, seed=2))


def test_two_bits_come_near_the_best_codes_there_are() -> None:
    weight, x = drawn(40, 6), drawn(400, 1) + 0.4 * drawn(400, 6, seed=1)
    statistics, form = statistics_of(x), BlockFormat(2, 0)
    nearest = round_to_nearest(weight, form)
    own = plain(weight, form, statistics, act_order=True, damping=1e-6)
    assert torch.equal(own.scale, nearest.scale)
    assert own.zero_point is not None
    codes = torch.tensor(list(itertools.product(range(4), repeat=6))).double()
    values = (codes - own.zero_point[:, :, None].double()) * own.scale[:, :, None].double()
    moments = statistics.second

    def error(rounded: Tensor) -> Tensor:
        off = rounded.double() - weight[:, None]
        return torch.einsum("nci,ij,ncj->nc", off, moments, off)

    best = error(values).amin(1)
    found, others = (error(dequantize(blocks)[:, None])[:, 0] for blocks in (own, nearest))
    assert (found >= best * (1 - 1e-6)).all()
    assert found.mean() < 1.35 * best.mean()
    assert others.mean() > 1.6 * best.mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_unrelated_inputs_are_rounded_to_nearest(act_order: bool, symmetric: bool) -> None:
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(4, 32, symmetric)
    own, nearest = (
        plain(weight, form, UNRELATED, act_order=act_order),
        round_to_nearest(weight, form),
    )
    assert torch.equal(own.scale, nearest.scale)
    assert torch.equal(own.codes, nearest.codes)
    if symmetric:
        assert own.zero_point is nearest.zero_point is None
    else:
        assert own.zero_point is not None
        assert torch.equal(own.zero_point, nearest.zero_point)


def test_in_order_of_power_every_block_keeps_the_scale_of_its_own_weights() -> None:
    # onnxruntime's sorts the rows and then takes its groups from the sorted ones.
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(4, 32)
    nearest = round_to_nearest(weight, form)
    own = plain(weight, form, SEEN, act_order=True)
    assert own.zero_point is not None
    assert torch.equal(own.scale, nearest.scale)
    assert torch.equal(own.zero_point, nearest.zero_point)
    assert not torch.equal(own.codes, nearest.codes)
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3))
    one = BlockFormat(4, 0)  # with one block, the order in which inputs come changes nothing
    shuffled = statistics_of(correlated(2000)[:, order])
    found = plain(weight[:, order], one, shuffled, act_order=True)
    assert (found.codes != plain(weight, one, SEEN, act_order=True).codes[:, order]).sum() < 10


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_for_ranges_lessens_the_error_that_it_looks_at(symmetric: bool) -> None:
    # onnxruntime's compares codes with weights, and loses 6 dB by it.
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(2, 128, symmetric)
    whole, searched = (
        plain(weight, form, UNRELATED, act_order=True, search=search) for search in (False, True)
    )
    errors = [
        (dequantize(b) - weight).abs().pow(2.4).unflatten(1, (-1, 128)).sum(2)
        for b in (whole, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()
    shares = searched.scale / whole.scale
    assert ((shares > 0.2) & (shares < 1.001)).all()


def test_the_search_weighs_errors_with_the_power_of_their_inputs() -> None:
    weight, form, power = drawn(OUTPUTS, INPUTS), BlockFormat(2, 128), drawn(INPUTS).exp()
    diagonal = statistics_of(torch.diag(power.sqrt()) * INPUTS**0.5)

    def error(statistics: InputStatistics) -> float:
        blocks = plain(weight, form, statistics, act_order=True, search=True)
        return float(((dequantize(blocks) - weight).abs().pow(2.4) * power).sum())

    assert error(diagonal) < 0.97 * error(UNRELATED)


def test_outputs_may_share_the_scales_of_a_block() -> None:
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(8, 32)
    blocks = plain(weight, form, SEEN, per_channel=False)
    assert torch.equal(blocks.scale, blocks.scale[:1].expand_as(blocks.scale))
    assert len(blocks.scale[0].unique()) == INPUTS // 32
    apart = plain(weight, form, SEEN)
    assert held_back(weight, apart) < held_back(weight, blocks) < 1e-3


def test_inputs_that_are_never_there_are_rounded_to_nearest() -> None:
    x = correlated(2000)
    x[:, 5::7] = 0
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(4, 32)
    own = plain(weight, form, statistics_of(x), act_order=True)
    nearest = round_to_nearest(weight, form)
    assert torch.equal(own.codes[:, 5::7], nearest.codes[:, 5::7])
    assert not torch.equal(own.codes, nearest.codes)
    nothing = plain(weight, form, statistics_of(torch.zeros(3, INPUTS)))
    assert torch.equal(nothing.codes, nearest.codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_how_many_inputs_are_worked_on_together_changes_nothing(act_order: bool) -> None:
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(4, 32)
    found = [
        plain(weight, form, SEEN, block=block, act_order=act_order) for block in (1, 32, 100, 1000)
    ]
    for blocks in found[1:]:
        assert torch.equal(blocks.codes, found[0].codes)  # sums in another order; no tie is hit
        torch.testing.assert_close(blocks.scale, found[0].scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [250, 16])
def test_other_types_and_a_last_block_that_is_cut_off(inputs: int, dtype: torch.dtype) -> None:
    weight = drawn(OUTPUTS, inputs).to(dtype)
    blocks = plain(weight, BlockFormat(4, 32), statistics_of(correlated(2000, 256)[:, :inputs]))
    assert blocks.codes.shape == weight.shape
    assert blocks.scale.shape == (OUTPUTS, -(-inputs // 32))
    assert blocks.scale.dtype == dtype
    assert output_error(weight.float(), dequantize(blocks).float(), drawn(99, inputs)) < 0.05


def test_groups_are_rounded_each_on_its_own_inputs() -> None:
    weight, form, x = drawn(3 * 8, 36), BlockFormat(4, 16), correlated(500, 108).reshape(500, 12, 9)
    together = InputStatistics(Unfold(kernel=(9,), groups=3))
    together.add(x)
    found = gptq(weight, form, together)
    for g in range(3):
        alone = gptq(
            weight[8 * g : 8 * g + 8],
            form,
            statistics_of(x[:, 4 * g : 4 * g + 4].flatten(1)),
        )
        own = slice(8 * g, 8 * g + 8)
        assert torch.equal(found.codes[own], alone.codes)
        torch.testing.assert_close(found.scale[own], alone.scale)


def test_damping_is_raised_where_the_moments_have_no_cholesky_factor_and_it_says_so() -> None:
    weight, form = drawn(OUTPUTS, INPUTS), BlockFormat(4, 32)
    few = statistics_of(correlated(20, 250)[:, torch.arange(INPUTS) % 250])
    with pytest.warns(QwrapWarning, match="not positive definite with damping=1e-30; 1e"):
        blocks = gptq(weight, form, few, damping=1e-30)
    assert dequantize(blocks).isfinite().all()


def test_it_refuses_what_it_cannot_work_with() -> None:
    weight, form = drawn(4, INPUTS), BlockFormat(4, 32)
    with pytest.raises(ConfigError, match="needs calibration data"):
        plain(weight, form, None)
    with pytest.raises(ConfigError, match="damping=0"):
        plain(weight, form, SEEN, damping=0)
    with pytest.raises(ConfigError, match="128 inputs, but statistics of 256"):
        plain(weight[:, :128], form, SEEN)
