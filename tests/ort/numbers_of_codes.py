"""Types, floats and a comparison that tests of codes share."""

import time

import hypothesis.strategies as st
import numpy as np
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto

INTEGERS = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT4,
    TensorProto.UINT4,
)
FLOAT8 = TensorProto.FLOAT8E4M3FN
finite32 = st.floats(-1e6, 1e6, width=32)
finite16 = st.floats(-1024, 1024, width=16)
values32 = arrays(np.float32, array_shapes(min_dims=1, max_dims=3), elements=finite32)
values16 = arrays(np.float16, array_shapes(min_dims=1, max_dims=3), elements=finite16)
booleans = st.booleans()
onnx_types = st.sampled_from(INTEGERS)


def same(ours, theirs) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and ours.tobytes() == theirs.tobytes()
    )


def elapsed(function, *arguments, times: int) -> float:
    """Return the shortest of some runs, in seconds."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        function(*arguments)
        took.append(time.perf_counter() - start)
    return min(took)
