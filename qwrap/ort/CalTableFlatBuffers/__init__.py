"""The flatbuffers form of calibration tables, for onnxruntime's TensorRT execution provider.

The schema, in the namespace ``CalTableFlatBuffers``::

    table KeyValue { key: string; value: string; }
    table TrtTable { dict: [KeyValue]; }
    root_type TrtTable;
"""
