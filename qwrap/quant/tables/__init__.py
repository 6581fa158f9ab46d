"""Tables of ranges: the files in which other tools keep what calibration found.

``RangeTable.read(path)`` tells the form of a file by its contents; ``table.write(path, form)``
refuses, with the reason, what the form cannot hold. The forms, and what comes back of a table
that was written in them:

==================== ============ ===== ==== =========== =================
form                 range        scale axis weights     read by
==================== ============ ===== ==== =========== =================
onnxruntime          exact        no    no   left out    quantize_static
tensorrt             maximum      int8  no   left out    TensorRT
tensorrt-flatbuffers maximum      no    no   left out    ORT's TensorRT EP
tensorrt-text        maximum      no    no   left out    people
tensorrt-json        exact        no    no   left out    people
aimet-0.6.1          exact        exact no   yes         AIMET, QNN
aimet-1.0.0          of the codes exact no   yes, blocks AIMET, QNN
aimet-2.0.0          of the codes exact yes  yes, blocks AIMET, QNN
qnn                  exact        exact no   yes         QNN
==================== ============ ===== ==== =========== =================

- *exact*: float32 as it was; onnxruntime's cache and JSON table keep float16 too, histograms,
  their edges, means and deviations. The cache also keeps its method and SmoothQuant's mark.
  AIMET 0.6.1 and QNN cut a range to what the codes reach, where there is a scale.
- *maximum*: one range for a tensor, its larger absolute end; ``[-3, 1]`` comes back as ``[-3, 3]``.
  Symmetric int8 codes go by their scale instead: their maximum is 127 times it.
- *int8*: TensorRT's own cache holds the bits of the scale, the maximum over 127; it comes back
  as the scale of symmetric int8 codes. A tensor that is always 0 has none.
- *of the codes*: the ends are not written, and come back as those of the type's first and last
  code, in int8 one step below a narrow range of weights.
- *weights left out*: these tools choose the scales of weights themselves. AIMET 2.0.0 does not
  tell weights from activations. Where "axis" says no, channels come back without their axis, which
  the model tells; the blocks of AIMET 1.0.0 without their shape, output channel by output channel.
- TensorRT's forms refuse an activation with ranges for channels.
- AIMET up to 1.0.0 and QNN know signed codes only with 0 for zero: others come back as the unsigned
  codes of the same values. They hold integers of 2 to 16 bits, and of 32 for biases; AIMET 2.0.0
  float8 and float4 as well. Entries without a scale need one first: ``table.with_scales(spec)``.
- AIMET's low-power blocks (LPBQ) are read as the scales of the blocks, and written as they came.
- Tensors that AIMET or QNN leave in floating point are in ``table.floating``.
- Names: any text in JSON and flatbuffers; no line breaks in files of lines. onnxruntime's TensorRT
  provider cuts lines of TensorRT's cache at the first colon; give it flatbuffers where names hold
  one.

QNN's converters read AIMET's versions as well. Their overrides without a version are form "qnn":
like 0.6.1, but an entry may hold a range and no scale.
"""

from qwrap.quant.tables.forms import FORMS
from qwrap.quant.tables.range_table import RangeTable
from qwrap.quant.tables.tensor_range import TensorRange

__all__ = ["FORMS", "RangeTable", "TensorRange"]
