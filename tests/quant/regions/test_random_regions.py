"""Random models with random regions: the file, both simulations and training agree."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import claims
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

CLAIMS: tuple[Callable[[claims.Made], None], ...] = (
    claims.types_agree,
    claims.is_opened,
    claims.conversions_are_fewest,
    claims.simulations_agree,
    claims.comes_back,
    claims.gradients_arrive,
    claims.state_is_restored,
)


# Thousands more were run before; a seed gives a model and its regions.
@settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(seed=st.integers(0, 2**20), count=st.integers(2, 12))
@pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning")  # types that have no kernels
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_whatever_the_model_and_its_regions(
    claim: Callable[[claims.Made], None], seed: int, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = claims.make(Random(seed), Path(folder), count)
        assume(made is not None)
        assert made is not None
        claim(made)
