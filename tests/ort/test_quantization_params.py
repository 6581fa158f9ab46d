"""What is known of one tensor, as a dictionary."""

import numpy as np
import onnxruntime.quantization.base_quantizer as incumbent
import pytest

from qwrap.ort.base_quantizer import QuantizationParams


@pytest.mark.ort(366)
def test_parameters_are_like_a_dictionary() -> None:
    for cls in (QuantizationParams, incumbent.QuantizationParams):
        params = cls(scale=np.float32([0.5]), zero_point=np.int8([1]), quant_type=3, axis=None)
        params["axis"] = 1
        assert len(params) == 4
        assert list(params) == ["scale", "zero_point", "quant_type", "axis"]
        assert "axis" in params
        assert params.get("axis") == params["axis"] == 1
        assert params.get("nothing", 7) == 7


@pytest.mark.ort(366)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"axis": 1.5}, TypeError),
        ({"zero_point": [1]}, TypeError),
        ({"scale": np.array([1.0])}, ValueError),
        ({"scale": np.array([1])}, ValueError),
    ],
)
def test_parameters_of_the_wrong_type_are_refused(wrong: dict, error: type[Exception]) -> None:
    for cls in (QuantizationParams, incumbent.QuantizationParams):
        with pytest.raises(error):
            cls(**wrong)


@pytest.mark.ort(366, "G35")
def test_parameters_may_be_numbers() -> None:
    """The incumbent asks a scale for its dtype, and refuses numpy's scalars."""
    params = QuantizationParams(scale=0.5, zero_point=3)
    assert (params["scale"].dtype, float(params["scale"]), params["zero_point"]) == (
        np.float32,
        0.5,
        3,
    )
    assert QuantizationParams(scale=np.float16(0.5), zero_point=np.uint8(3))["scale"] == 0.5
    with pytest.raises(AttributeError):
        incumbent.QuantizationParams(scale=0.5)
    with pytest.raises(TypeError):
        incumbent.QuantizationParams(zero_point=np.uint8(3))
