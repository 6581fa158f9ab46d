"""The whole pipeline on a GPU, against the same on the CPU."""

from pathlib import Path

import pytest
import torch

import qwrap
from qwrap import fused
from qwrap.demo import batches as demo_batches
from qwrap.demo import model_path
from qwrap.quant.observe.observers import HistogramObserver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return [torch.from_numpy(b["image"]) for b in demo_batches("calibration", 50)[:4]]


@pytest.fixture(autouse=True)
def _exact_products():
    """Without TF32, as sums of integer codes need more than its 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def calibrated(device: str, data: list[torch.Tensor]) -> qwrap.WrappedModel:
    model = qwrap.load(model_path()).eval().to(device)
    qwrap.prepare(model)
    qwrap.calibrate(model, data, progress=False)
    return model


@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_observers_give_the_bits_of_the_cpu_without_waiting(
    axis: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 8, 40, 50) * 8.0**i for i in range(4)]
    batches[1][0, 0, 0, :3] = torch.tensor([torch.nan, -torch.inf, -3.4e38])
    there, here = HistogramObserver("x", axis), HistogramObserver("x", axis)
    moved = [batch.to(dtype).cuda() for batch in batches]
    for batch in batches:
        here.observe(batch.to(dtype))
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises
    try:
        for batch in moved:
            there.observe(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.histogram.counts.is_cuda
    assert (there.count, there.masked, there.nonfinite) == (here.count, here.masked, here.nonfinite)
    found, expected = there.cpu().get_extra_state(), here.get_extra_state()
    for key in ("extremes", "averages", "counts", "exponent"):
        assert torch.equal(found[key], expected[key]), key


def test_float_outputs_agree(data) -> None:
    model = qwrap.load(model_path()).eval()
    with torch.no_grad():
        expected, got = model(data[0]), model.to("cuda")(data[0].cuda())
    # Sums of up to 864 products in another order: 864 * 2^-24 of the largest, with room for depth.
    assert (got.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_exact_simulation_gives_the_same_codes(data) -> None:
    model = calibrated("cuda", data)
    with torch.no_grad(), qwrap.exact(model):
        got = model(data[0].cuda()).cpu()
    with torch.no_grad(), qwrap.exact(model.to("cpu")):
        expected = model(data[0])
    assert torch.equal(got, expected)


def test_verify_finds_no_difference_from_onnxruntime(data, tmp_path: Path) -> None:
    model = calibrated("cuda", data)
    qwrap.export(model, tmp_path / "q.onnx")
    report = qwrap.verify(model, tmp_path / "q.onnx", data[:2], progress=False)
    assert report.differing_codes == 0


def test_algorithms_and_a_training_step_run(data) -> None:
    model = calibrated("cuda", data)
    qwrap.round_weights(model, data)
    qwrap.correct_biases(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(data[0].cuda()).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_fine_tuning_runs_where_the_model_is(data) -> None:
    model = calibrated("cuda", data)
    report = qwrap.finetune(
        model, data, steps=4, evaluate=1, autocast=torch.bfloat16, progress=False
    )
    assert len(report.history) == 5
    assert all(parameter.is_cuda for parameter in model.parameters())


@pytest.mark.parametrize("like", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 100_003), (1, 64, 576), (768, 96, 1)])
def test_learned_passes_give_the_bits_of_the_cpu(
    shape: tuple[int, int, int], like: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 2).to(like)
    gradient = torch.randn(shape, generator=generator).to(like)
    scale = torch.rand(shape[1], generator=generator) * 0.1 + 0.01
    zero_point = torch.arange(shape[1], dtype=torch.int32) % 7
    with fused.use("eager"):
        values, kept = fused.forward(x, scale, zero_point, -128, 127, keep=True)
        assert kept is not None
        expected = fused.backward_kept(gradient, kept, needs=fused.Needs())
    x, gradient, scale, zero_point = (t.cuda() for t in (x, gradient, scale, zero_point))
    for how in ("eager", "auto"):
        with fused.use(how):
            mine, saved = fused.forward(x, scale, zero_point, -128, 127, keep=True)
            assert saved is not None
            got = fused.backward_kept(gradient, saved, needs=fused.Needs())
            exact = fused.backward_recomputed(
                gradient, x, scale, zero_point, -128, 127, needs=fused.Needs()
            )
        assert torch.equal(mine.cpu(), values)
        assert torch.equal(saved.cpu(), kept)
        for result in (got, exact):
            assert torch.equal(result.x.cpu(), expected.x)
        for mine_sum, sum_ in zip(got[1:], expected[1:], strict=True):
            # Sums of up to 1e5 float32 numbers near 1, each in an order of its own.
            assert torch.allclose(mine_sum.cpu(), sum_, rtol=1e-4, atol=1e-2)
