"""Makes a file with AIMET-ONNX.

Install: ``pip install aimet-onnx onnxruntime``.

"default" folds BatchNormalization, simulates and calibrates, with a scale per output channel;
"high" equalizes layers first, where there are convolutions, and then looks for the ranges of 8-bit
weights by sequential MSE, or learns the rounding of 4-bit ones (AdaRound) with as many steps as
AIMET advises.
"""

from __future__ import annotations

from pathlib import Path

import aimet_onnx
import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import equalize_model
from file_order import Order, serve

from rivals.float_model import load

_CONFIG = "common/quantsim_config/default_config_per_channel.json"
_STEPS = 15_000  # for each layer, with fewer than 8 bits


def make(order: Order) -> list[str]:
    """Quantize, by calibration alone or with CLE and sequential MSE or AdaRound."""
    model, data = load(order.source), order.data
    equalized = order.effort == "high" and any(n.op_type == "Conv" for n in model.graph.node)
    if equalized:
        equalize_model(model)  # folds BatchNormalization too
    else:
        fold_all_batch_norms_to_weight(model)
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=f"int{order.weight}",
        activation_type=f"int{order.activation}",
        config_file=str(Path(aimet_onnx.__file__).parent / _CONFIG),
        dummy_input=next(iter(data)),
    )
    done = ["layers equalized"] if equalized else []
    if order.effort == "high" and order.weight == 8:
        aimet_onnx.apply_seq_mse(sim, data)
        done.append("ranges of weights by sequential MSE")
    elif order.effort == "high":
        aimet_onnx.apply_adaround(sim, data, num_iterations=_STEPS)
        done.append("rounding of weights learned")
    sim.compute_encodings(data)
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True), order.target)
    return done


if __name__ == "__main__":
    serve(make, aimet_onnx.__version__)
