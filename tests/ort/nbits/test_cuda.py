"""CudaQuantizer beside the incumbent's, whose layouts torch makes on any device."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnxruntime.quantization.cuda_quantizer as incumbent
import pytest
import torch

import qwrap.ort.cuda_quantizer as ours
from qwrap.ort.cuda_quantizer import CudaQuantizer as Ours

Theirs = incumbent.CudaQuantizer


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


def weights(*shape: int) -> torch.Tensor:
    drawn = np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)
    drawn[0] = 0
    return torch.from_numpy(drawn)


def assert_equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


@pytest.mark.ort(304, 305, 306, 307, 308, 309, 310)
def test_names_and_signatures() -> None:
    names = [n for n in vars(Theirs) if not n.startswith("_")]
    for name in names:
        a, b = (inspect.signature(getattr(c, name)).parameters for c in (Ours, Theirs))
        assert [(p.name, p.kind, p.default) for p in a.values()] == [
            (p.name, p.kind, p.default) for p in b.values()
        ]
    assert ours.has_cuda_weight_prepacking() is incumbent.has_cuda_weight_prepacking() is True


@pytest.mark.ort(304)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_per_channel(bits: int, full: bool) -> None:
    given = {"unsigned_full_range": full}
    assert_equal(
        *(
            c.qmoe_symmetric_per_channel_quantize(weights(16, 64), bits, **given)
            for c in (Ours, Theirs)
        )
    )


@pytest.mark.ort(304, 305)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_prepacked_experts(bits: int, arch: int) -> None:
    packed = [
        c.qmoe_per_channel_quantize(weights(32, 128), bits, True, arch) for c in (Ours, Theirs)
    ]
    assert_equal(*packed)
    assert packed[0][0].shape == (128, 32 * bits // 8)
    raw = [c.qmoe_per_channel_quantize(weights(32, 128), bits, False) for c in (Ours, Theirs)]
    assert_equal(*raw)


@pytest.mark.ort(306)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "inputs"), [(4, 32, 128), (4, 16, 40), (8, 64, 100)])
def test_blocks(
    bits: int, block: int, inputs: int, symmetric: bool, absolute: bool, full: bool
) -> None:
    for flat in (True, False):
        a, b = (
            c.matmulnbits_blockwise_quantize(
                weights(16, inputs),
                bits,
                block,
                symmetric=symmetric,
                return_zero_points=True,
                abs_scales=absolute,
                flatten_qweight=flat,
                unsigned_full_range=full,
            )
            for c in (Ours, Theirs)
        )
        assert_equal(a, b)


@pytest.mark.ort(306)
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_mean_the_weights(bits: int) -> None:
    weight = weights(16, 64)
    packed, scale = Ours.matmulnbits_blockwise_quantize(weight, bits, 32)
    codes = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    meant = (codes.float() - 2 ** (bits - 1)) * scale.repeat_interleave(32, 1)
    # The highest code is missing on one side: there a value is wrong by up to a step.
    assert ((meant - weight).abs() <= scale.repeat_interleave(32, 1) * 1.001).all()


@pytest.mark.ort(307)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("arch", "block"), [(80, 32), (80, 64), (80, 128), (90, 64), (90, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_prepacked_blocks(bits: int, arch: int, block: int, symmetric: bool) -> None:
    a, b = (
        c.matmulnbits_prepacked_blockwise_quantize(
            weights(32, 256), bits, block, arch, symmetric=symmetric, return_zero_points=True
        )
        for c in (Ours, Theirs)
    )
    assert_equal(a, b)
    assert a[0].shape == (32, 256 // block, block * bits // 8)


@pytest.mark.ort(307)
@pytest.mark.parametrize("cls", [Ours, Theirs])
@pytest.mark.parametrize(
    ("inputs", "bits", "block", "arch", "message"),
    [
        (256, 4, 16, 80, "block_size must be one of"),
        (256, 4, 32, 90, "block_size must be one of"),
        (256, 4, 32, 70, "force_arch must be 80"),
        (200, 4, 64, 80, "must be divisible by block_size"),
        (256, 2, 64, 80, "4 or 8"),
    ],
)
def test_layouts_that_kernels_do_not_have(
    inputs: int, bits: int, block: int, arch: int, message: str, cls: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        cls.matmulnbits_prepacked_blockwise_quantize(weights(32, inputs), bits, block, arch)


@pytest.mark.ort(304, 305, 308)
@pytest.mark.parametrize("cls", [Ours, Theirs])
def test_sizes_that_layouts_do_not_have(cls: Any) -> None:
    with pytest.raises(ValueError, match="must be divisible by 2"):
        cls.qmoe_symmetric_per_channel_quantize(weights(16, 63), 4)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        cls.qmoe_symmetric_per_channel_quantize(weights(16, 64), 3)
    with pytest.raises(ValueError, match="must be divisible by 2"):
        cls.qmoe_per_channel_quantize(weights(15, 64), 4, True)
    with pytest.raises(ValueError, match="must be divisible by 2"):
        cls.qmoe_prepacked_blockwise_quantize(weights(15, 64), 4, 32)
    with pytest.raises(ValueError, match=r"multiple|incompatible"):
        cls.qmoe_prepacked_blockwise_quantize(weights(8, 64), 4, 32)
    with pytest.raises(ValueError, match="positive block_size"):
        cls.matmulnbits_blockwise_quantize(weights(8, 64), 4, 0)


@pytest.mark.ort(308)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_prepacked_blocks_of_experts(bits: int, arch: int) -> None:
    a, b = (
        c.qmoe_prepacked_blockwise_quantize(
            weights(32, 128), bits, 64, arch, return_zero_points=True
        )
        for c in (Ours, Theirs)
    )
    assert_equal(a, b)
    assert (a[0].shape, a[1].shape) == ((128, 32 * bits // 8), (32, 2))


@pytest.mark.ort(309)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (8, 40), (2, 3, 50), (8, 33)])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_in_torch(bits: int, shape: tuple[int, ...], full: bool) -> None:
    given = {"unsigned_full_range": full}
    assert_equal(
        *(
            c.symmetric_blockwise_quantize(weights(*shape), bits, 16, **given)
            for c in (Ours, Theirs)
        )
    )
    for cls in (Ours, Theirs):
        with pytest.raises(ValueError, match="4 or 8 bits"):
            cls.symmetric_blockwise_quantize(weights(8, 64), 2, 16)
