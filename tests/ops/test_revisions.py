"""Every operator and revision that onnxruntime has a kernel for, against onnxruntime.

``oracles`` holds the inputs and attributes: every variant runs with static shapes and with
symbolic ones, the latter for two shapes, which is also where inputs that steer shapes, such as the
axes of ReduceSum, become graph inputs instead of initialisers.
"""

import pytest
from oracles.families import REVISIONS
from oracles.runs import NEWEST_OPSET, NoKernelError, compare
from oracles.variants import GENERATORS, revisions

IN_REACH = [(name, revision) for name, revision in REVISIONS if revision <= NEWEST_OPSET]

# What onnxruntime 1.31 has schemas but no kernels for on a CPU: mostly what opset 6 or 7 replaced.
WITHOUT_KERNEL = {
    "Abs": (1,), "Add": (1, 6), "And": (1,), "AveragePool": (1,), "BatchNormalization": (1, 6),
    "Bernoulli": (22,), "Cast": (1,), "Ceil": (1,), "Clip": (1,), "Concat": (1,), "Div": (1, 6),
    "Dropout": (1, 6), "Elu": (1,), "Equal": (1,), "Exp": (1,), "Floor": (1,), "GRU": (1, 3),
    "Gemm": (1, 6), "GlobalLpPool": (1, 22), "Greater": (1,), "HardSigmoid": (1,), "If": (1,),
    "ImageDecoder": (20,), "InstanceNormalization": (1,), "LSTM": (1,), "LeakyRelu": (1,),
    "Less": (1,), "Log": (1,), "Loop": (1,), "LpPool": (1,), "Max": (1,), "MaxRoiPool": (22,),
    "Mean": (1,), "Min": (1,), "Mul": (1, 6), "Multinomial": (22,), "Neg": (1,), "Or": (1,),
    "PRelu": (1, 6), "Pad": (1,), "Pow": (1,), "RNN": (1,), "RandomNormal": (22,),
    "RandomNormalLike": (22,), "RandomUniform": (22,), "RandomUniformLike": (22,),
    "Reciprocal": (1,), "Relu": (1,), "RoiAlign": (22,), "Scatter": (11,), "Selu": (1,),
    "Sigmoid": (1,), "Split": (1,), "Sqrt": (1,), "Sub": (1, 6), "Sum": (1,), "Tanh": (1,),
    "Tile": (1,), "Upsample": (1, 10), "Xor": (1,),
}  # fmt: skip
COMPARED = [(name, r) for name, r in IN_REACH if r not in WITHOUT_KERNEL.get(name, ())]


@pytest.mark.parametrize(("op_type", "revision"), COMPARED)
def test_equals_onnxruntime(op_type: str, revision: int) -> None:
    compared = 0
    for variant in GENERATORS[op_type](revision):
        try:
            compare(op_type, revision, variant)
        except NoKernelError:  # for this type or attribute
            continue
        compared += 1
    assert compared, "onnxruntime has no kernel"


@pytest.mark.parametrize("op_type", WITHOUT_KERNEL)
def test_onnxruntime_has_no_kernel(op_type: str) -> None:
    for revision in WITHOUT_KERNEL[op_type]:
        for variant in GENERATORS[op_type](revision):
            with pytest.raises(NoKernelError):
                compare(op_type, revision, variant)


def test_every_revision_up_to_the_newest_opset_of_onnxruntime_is_accounted_for() -> None:
    oldest = {s.name: s.since_version for s in reversed(list(revisions()))}
    assert GENERATORS.keys() == {name for name in oldest if oldest[name] <= NEWEST_OPSET}
    assert len(COMPARED) + sum(map(len, WITHOUT_KERNEL.values())) == len(IN_REACH)
