import pytest
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8, UINT8
from qwrap.errors import NotCalibratedError
from qwrap.numerics import QParams
from qwrap.quant.observe.observers import MinMaxObserver
from qwrap.quant.stubs import BiasStub, Stub

U8 = QuantSpec(dtype=UINT8, symmetric=False)
S8 = QuantSpec(dtype=INT8, axis=0)


def stub(scale=0.5, zero_point=10, spec=U8):
    made = Stub("t", spec, observer=MinMaxObserver("t"))
    made.set_qparams(QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)))
    return made


def test_only_quantize_rounds() -> None:
    x = torch.tensor([-9.0, -0.3, 0.25, 0.75, 300.0])
    made = stub()
    assert torch.equal(made(x), x)
    assert made.observer.count == 0
    made.mode = "observe"
    assert torch.equal(made(x), x)
    assert made.observer.count == 5
    made.mode = "quantize"
    # Codes 0, 9 (-0.6 to -1), 10 (0.5 to even 0), 12 (1.5 to even 2), 255.
    assert made(x).tolist() == [-5.0, -0.5, 0.0, 1.0, 122.5]
    assert made.observer.count == 5


def test_a_scale_that_is_not_known_is_an_error_that_names_the_tensor() -> None:
    with pytest.raises(NotCalibratedError, match=r"tensor 'conv_1' has no scale yet"):
        _ = Stub("conv_1", U8).qparams


def test_a_scale_that_training_has_made_nan_is_another_error() -> None:
    made = Stub("conv_1", U8, training_by="lsq")
    made.set_qparams(QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32)))
    with torch.no_grad():
        made.get_parameter("gain").fill_(float("nan"))
    with pytest.raises(NotCalibratedError, match=r"'conv_1': its scale has become NaN in training"):
        _ = made.qparams


def test_forget_drops_the_scale_and_keeps_the_buffer() -> None:
    made = stub()
    buffer = made.initial_scale
    made.forget(None)
    assert made.initial_scale is buffer
    assert made.observer is None
    with pytest.raises(NotCalibratedError, match="no scale"):
        _ = made.qparams


def test_the_mode_is_saved() -> None:
    made, other = stub(), Stub("t", U8, observer=MinMaxObserver("t"))
    made.mode = "quantize"
    other.load_state_dict(made.state_dict())
    assert other.mode == "quantize"
    assert torch.equal(other.scale, made.scale)


def bias_stub():
    weight = Stub("w", S8, shape=(2,))
    zero = torch.zeros(2, dtype=torch.int32)
    weight.set_qparams(QParams(torch.tensor([0.25, 0.5]), zero, 0))
    made = BiasStub("b", stub(), weight)
    made.mode = "quantize"
    return made


def test_a_bias_lies_on_the_grid_of_the_accumulator() -> None:
    made = bias_stub()
    bias = torch.tensor([1.0, -0.7])
    assert made.scale.tolist() == [0.125, 0.25]
    assert made.codes(bias).tolist() == [8, -3]
    assert made(bias).tolist() == [1.0, -0.75]


def test_the_gradient_of_a_bias_passes_and_its_value_is_exact() -> None:
    made = bias_stub()
    bias = torch.tensor([0.1, -0.7], requires_grad=True)
    result = made(bias)
    assert result.tolist() == [0.125, -0.75]
    result.backward(torch.tensor([2.0, 3.0]))
    assert bias.grad.tolist() == [2.0, 3.0]


def test_a_bias_stub_follows_its_scales_and_holds_none() -> None:
    made = bias_stub()
    assert set(made.state_dict()) == {"_extra_state"}
    made._stubs[0].initial_scale.mul_(2)
    assert made.scale.tolist() == [0.25, 0.5]


def test_print_shows_type_axis_and_mode() -> None:
    assert "uint8, float" in repr(Stub("t", U8))
    assert "int8, axis=0, float" in repr(Stub("w", S8, shape=(2,)))
    assert "int32, quantize" in repr(bias_stub())
