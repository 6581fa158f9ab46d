"""Makes a file with NNCF's ONNX backend, which has 8 bits only.

Install: ``pip install nncf onnx onnxruntime``.

"high" is its mixed preset (asymmetric activations), its transformer scheme with SmoothQuant where
there is attention, and accurate instead of fast bias correction.
"""

from __future__ import annotations

import nncf
import onnx
from file_order import Order, serve

from rivals.float_model import has_attention, load


def make(order: Order) -> list[str]:
    """Quantize, by defaults or as well as NNCF can."""
    if (order.weight, order.activation) != (8, 8):
        raise NotImplementedError("NNCF quantizes ONNX models to 8 bits only")
    model, data = load(order.source), nncf.Dataset(order.data)
    options = {"subset_size": len(order.data)}
    if order.effort == "high":
        options |= {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False}
        if has_attention(model):
            options["model_type"] = nncf.ModelType.TRANSFORMER
    onnx.save(nncf.quantize(model, data, **options), order.target)
    return [f"{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    serve(make, nncf.__version__)
