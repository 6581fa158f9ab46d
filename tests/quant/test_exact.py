import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

import qwrap
from qwrap.errors import ConfigError, ModelError
from qwrap.model.points import ValuePoint
from qwrap.numerics import QParams

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def test_a_model_that_is_not_prepared_has_no_exact_program(small) -> None:
    with (
        pytest.raises(ConfigError, match="not prepared"),
        qwrap.exact(qwrap.load(small.convs())),
    ):
        pass


def test_an_exception_restores_the_training_form(small, quantized) -> None:
    model = quantized(small.convs()).model
    x = torch.from_numpy(small.batches()[0])
    before = model(x)
    with pytest.raises(ModelError), qwrap.exact(model):
        raise ModelError("anything")
    assert model(x).grad_fn is not None  # the exact program has no gradients
    assert torch.equal(model(x), before)


def test_exact_nests(small, quantized) -> None:
    model = quantized(small.convs()).model
    x = torch.from_numpy(small.batches()[0])
    with qwrap.exact(model):
        outer = model(x)
        with qwrap.exact(model):
            assert torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
    assert model(x).requires_grad


def test_weights_are_quantized_anew_on_entry(small, quantized) -> None:
    model = quantized(small.convs()).model
    x = torch.from_numpy(small.batches()[0])
    with qwrap.exact(model):
        before = model(x)
    with torch.no_grad():
        model.stored("w2").mul_(0.5)
    with qwrap.exact(model):
        assert not torch.equal(model(x), before)


def test_exact_gives_what_onnxruntime_gives(small, quantized) -> None:
    result = quantized(small.convs())
    for batch in small.batches(3, seed=9):
        with qwrap.exact(result.model):
            found = result.model(torch.from_numpy(batch))
        (expected,) = small.run(result.path, batch)
        np.testing.assert_array_equal(found.numpy(), expected)


SETTINGS = {
    "u8 weights": {"weight": "uint8"},
    "u8 weights per tensor": {"weight": "uint8", "per_channel": False},
    "s8 weights per tensor": {"per_channel": False},
    "s8 activations": {"activation": "int8"},
    "s8 activations and u8 weights": {"activation": "int8", "weight": "uint8"},
    "minmax": {"method": "minmax", "weight_method": "minmax"},
    "percentile": {"method": "percentile", "percentile": 99.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_8_bit_setting_is_exact(small, quantized, name: str) -> None:
    signed = SETTINGS[name].get("activation") == "int8"
    # onnxruntime fuses no int8 tensor with two readers (1.31, x86).
    middle = "d = Sigmoid(c)" if signed else "d = Add(c, b)"
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2, b2) "
        f"{middle} e = GlobalAveragePool(d) f = Flatten(e) y = Gemm(f, w3, b3)"
    )
    weights = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "b2": (6,)}
    source = small.build(nodes, weights | {"w3": (6, 20), "b3": (20,)}, outputs="float[N,20] y")
    result = quantized(source, config=qwrap.QConfig(scope="kernels", **SETTINGS[name]))
    found = result.operators()
    between = found["QLinearAdd"] + found["QLinearSigmoid"]
    assert (found["QLinearConv"], between, found["QGemm"]) == (2, 1, 1), found
    report = result.verify()
    assert report.deployed.differing == 0
    assert report.deployed.outputs[0].max_abs_difference == 0


@pytest.mark.parametrize("name", ["uint16", "int16"])
def test_16_bit_activations_run_as_specified(small, quantized, name: str) -> None:
    """onnxruntime fuses none of them: it computes in float between the pairs, and so do we."""
    result = quantized(small.convs(), config=qwrap.QConfig(scope="kernels", activation=name))
    kinds = {t.data_type for t in result.file().graph.initializer}
    assert getattr(TensorProto, name.upper()) in kinds
    assert result.file().opset_import[0].version == 21
    report = result.verify()
    # Sums in another order: 1e-7 relative, against steps of 1e-5 of the range.
    assert report.deployed.differing <= 0.02 * report.deployed.elements
    assert report.deployed.worst_step <= 1


def test_a_gemm_with_float_output_adds_its_bias_in_codes(small, quantized) -> None:
    source = small.build(
        "y = Gemm(x, w, b)", {"w": (12, 20), "b": (20,)}, "float[N,12] x", "float[N,20] y"
    )
    result = quantized(source, small.batches(shape=(4, 12)))
    assert result.operators()["QGemm"] == 1
    assert result.verify().deployed.outputs[0].max_abs_difference == 0


@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, low, high)"])
def test_an_activation_behind_a_kernel_that_gives_floats_is_computed(
    small, quantized, activation: str
) -> None:
    weights = {"w": (12, 20), "low": -0.5 * np.ones((), "f"), "high": np.ones((), "f")}
    nodes = f"a = MatMul(x, w) y = {activation}"
    source = small.build(nodes, weights, "float[N,12] x", "float[N,20] y")
    result = quantized(source, small.batches(shape=(4, 12)))
    assert result.verify().deployed.outputs[0].max_abs_difference == 0


def test_exact_runs_in_a_copy_of_another_thread_count(small, quantized) -> None:
    model = quantized(small.convs()).model
    x = torch.from_numpy(small.batches()[0])
    with qwrap.exact(model):
        one = model(x)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(model(x), one)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet20_cifar10", (3, 2)),  # two Pads of channels, for which there is no kernel
        ("squeezenet1_0_imagenet", (1, 1)),
        ("mobilenetv2_cifar10_128", (1, 0)),  # QGemm writes float
    ],
)
def test_real_networks_are_exact(tmp_path, name: str, left: tuple[int, int], small) -> None:
    if not (SHARED / "models" / f"{name}.onnx").exists():
        pytest.skip(f"no shared models in {SHARED}; set QWRAP_SHARED")
    sys.path.insert(0, str(SHARED / "data"))
    try:
        load = __import__("load")
    finally:
        sys.path.pop(0)
    target = tmp_path / "q.onnx"
    calibration = [inputs for inputs, _ in load.calib(name, 8)]
    model = qwrap.quantize(
        load.model_path(name),
        target,
        calibration=calibration,
        config=qwrap.QConfig(scope="kernels"),
        progress=False,
    )
    small.session(target, tmp_path / "optimised.onnx")
    import onnx

    found = small.operators(onnx.load(tmp_path / "optimised.onnx").graph)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == left, found
    batches = [inputs for inputs, _ in load.val(name, 4)]
    report = qwrap.verify(model, target, batches, progress=False)
    assert report.deployed.differing == 0
    assert report.deployed.top1_agreement == 1


NEIGHBOURS = {
    "a float Add between quantized layers": (
        "a = Conv(x, w) b = Conv(x, u) c = Add(a, b) y = Conv(c, o)",
        ["Add"],
    ),
    "a float Concat between quantized layers": (
        "a = Conv(x, w) b = Conv(x, u) c = Concat<axis=0>(a, b) y = Conv(c, o)",
        ["Concat"],
    ),
    "a float Sigmoid between quantized layers": (
        "a = Conv(x, w) c = Sigmoid(a) y = Conv(c, o)",
        ["Sigmoid"],
    ),
    "a float Relu between quantized layers": (
        "a = Conv(x, w) c = Relu(a) y = Conv(c, o)",
        ["Relu"],
    ),
    "a layer read before and after its Relu": (
        "a = Conv(x, w) r = Relu(a) b = Conv(r, p) c = Add(a, b) y = Conv(c, o)",
        [],
    ),
    "a float MaxPool between quantized layers": (
        "a = Conv(x, w) c = MaxPool<kernel_shape=[2,2]>(a) y = Conv(c, o)",
        ["MaxPool"],
    ),
    "two activations in a row": (
        "a = Conv(x, w) r = Relu(a) c = Clip(r, , six) y = Conv(c, o)",
        [],
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_onnxruntime_fuses_unasked_is_simulated_as_fused(small, quantized, name: str) -> None:
    nodes, excluded = NEIGHBOURS[name]
    weights = {"w": (6, 3, 1, 1), "u": (6, 3, 1, 1), "o": (4, 6, 1, 1), "p": (6, 6, 1, 1)}
    weights["six"] = np.array(0.4, np.float32)
    used = {k: v for k, v in weights.items() if f"{k})" in nodes}
    config = qwrap.QConfig(scope="kernels", excluded=excluded, method="minmax")
    batches = small.batches(shape=(4, 3, 32, 32))
    source = small.build(nodes, used, "float[N,3,H,W] x")
    result = quantized(source, batches, config)
    report = result.verify()
    assert report.deployed.differing == 0, (result.operators(), str(report))


def test_an_excluded_add_rounds_as_the_kernel_that_onnxruntime_takes(small, tmp_path: Path) -> None:
    """Half of the sums are ties, which the kernel rounds after it has added an odd zero point."""
    nodes, excluded = NEIGHBOURS["a float Add between quantized layers"]
    weights = {"w": (6, 3, 1, 1), "u": (6, 3, 1, 1), "o": (4, 6, 1, 1)}
    model = qwrap.load(small.build(nodes, weights)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", excluded=excluded))
    qwrap.calibrate(model, small.batches(), progress=False)
    for name, scale in (("a", 2**-5), ("b", 2**-5), ("c", 2**-4)):
        zero_point = torch.tensor([127], dtype=torch.int32)
        model.tap(ValuePoint(name)).set_qparams(QParams(torch.tensor([scale]), zero_point))
    qwrap.export(model, tmp_path / "q.onnx")
    report = qwrap.verify(model, tmp_path / "q.onnx", small.batches(), progress=False)
    assert report.deployed.differing == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_no_activation_is_absorbed_where_codes_lie_on_both_sides_of_zero(
    small, quantized, dtype: str
) -> None:
    """The kernel would clamp at the smallest code, which is no longer that of 0."""
    config = qwrap.QConfig(activation=qwrap.QuantSpec(dtype=dtype, symmetric=True), scope="kernels")
    result = quantized(small.convs(), small.batches(), config)
    roles = {node.role for node in result.model.plan.nodes.values() if node.op_type == "Relu"}
    assert roles == {"float"}
    assert result.verify().deployed.differing == 0


def test_the_training_mode_of_scales_that_follow_changes_no_kernel(small) -> None:
    model = qwrap.load(small.convs())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", training="follow"))
    qwrap.calibrate(model, small.batches(), progress=False)
    x = torch.from_numpy(small.batches()[0])
    found = []
    for training in (False, True):
        model.train(training)
        with qwrap.exact(model):
            found.append((set(model.program.kernels), model(x)))
    assert found[0][0] == found[1][0] != set()
    assert torch.equal(found[0][1], found[1][1])
