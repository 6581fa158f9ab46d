"""A table in place of calibration, in every form."""

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.quant.prepare import stubs
from qwrap.quant.tables import FORMS, RangeTable


def prepared(source: onnx.ModelProto, **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    return model


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("aimet", "qnn"))])
@pytest.mark.parametrize("activation", ["uint8", "int8", "uint16"])
def test_encodings_of_a_model_put_its_scales_on_another(
    small, tmp_path, form: str, activation: str
) -> None:
    first = prepared(small.convs(), activation=activation)
    qwrap.calibrate(first, small.batches(), progress=False)
    RangeTable.of(first).write(tmp_path / "t", form)
    second = prepared(small.convs(), activation=activation)
    qwrap.rescale(second, RangeTable.read(tmp_path / "t"))
    for (_, a), (_, b) in zip(stubs(first), stubs(second), strict=True):
        assert torch.equal(a.scale, b.scale), a.name
        assert torch.equal(a.zero_point, b.zero_point), a.name
    x = torch.from_numpy(small.batches()[0])
    assert torch.equal(first(x), second(x))


def test_onnxruntimes_cache_gives_the_codes_of_the_model(small, tmp_path) -> None:
    first = prepared(small.convs(), method="minmax")
    qwrap.calibrate(first, small.batches(), progress=False)
    RangeTable.of(first).write(tmp_path / "t", "onnxruntime")
    second = prepared(small.convs())
    qwrap.rescale(second, RangeTable.read(tmp_path / "t"))
    for (_, a), (_, b) in zip(stubs(first), stubs(second), strict=True):
        # The scale is that of ends which are products rounded to float32.
        np.testing.assert_allclose(a.scale, b.scale, rtol=2.0**-22)
        assert torch.equal(a.zero_point, b.zero_point), a.name


def test_a_table_of_tensorrt_gives_symmetric_codes_their_scale(small, tmp_path) -> None:
    spec = qwrap.QuantSpec(dtype="int8")
    first = prepared(small.convs(), activation=spec)
    qwrap.calibrate(first, small.batches(), progress=False)
    RangeTable.of(first).write(tmp_path / "t", "tensorrt")
    second = prepared(small.convs(), activation=spec)
    qwrap.rescale(second, RangeTable.read(tmp_path / "t"))
    for (_, a), (_, b) in zip(stubs(first), stubs(second), strict=True):
        assert torch.equal(a.scale, b.scale), a.name
