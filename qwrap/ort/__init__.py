"""onnxruntime.quantization's names, for scripts that change one import.

``from qwrap.ort import quantize_static, CalibrationDataReader, QuantType``: same arguments,
defaults, files and graph forms, submodules by the same names. Where onnxruntime's tool is wrong
this one is right; ``tutorials/from_onnxruntime.md`` lists what differs.
"""
