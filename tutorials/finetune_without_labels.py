"""Win back what quantization cost, without labels, on a small network made here.

Run it in any folder: ``python tutorials/finetune_without_labels.py``. It leaves ``float.onnx`` and
``tuned.onnx`` there.
"""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

import qwrap

# 1. A float file that somebody trained: which of four spiral arms is a point on? Labels are used
#    here and never again.
proto = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17]>
    spirals (float[N, 2] points) => (float[N, 4] logits) {
        ["/body/0/Gemm"] a = Gemm(points, "body.0.weight", "body.0.bias")
        ["/body/1/Relu"] b = Relu(a)
        ["/body/2/Gemm"] c = Gemm(b, "body.2.weight", "body.2.bias")
        ["/body/3/Relu"] d = Relu(c)
        ["/head/Gemm"] logits = Gemm(d, "head.weight", "head.bias")
    }
""")
rng = np.random.default_rng(0)
for name, rows, columns in (("body.0", 2, 64), ("body.2", 64, 64), ("head", 64, 4)):
    weight = rng.normal(0, (2 / rows) ** 0.5, (rows, columns)).astype(np.float32)
    bias = np.zeros(columns, np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
    proto.graph.initializer.append(numpy_helper.from_array(bias, f"{name}.bias"))


def spirals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on four arms, and which arm each is on."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(count, generator=generator).sqrt()
    arms = torch.randint(4, (count,), generator=generator)
    noise = 0.1 * torch.randn(count, generator=generator)
    angle = 4 * radius + arms * torch.pi / 2 + noise
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1), arms


points, arms = spirals(4000, seed=0)
network = qwrap.load(proto)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for part in torch.randint(len(points), (600, 200), generator=torch.Generator().manual_seed(0)):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(points[part]), arms[part]).backward()
    optimizer.step()
qwrap.export(network, "float.onnx")

# 2. Quantize: weights of 4 bits move the logits. From here on there are points and no arms.
unlabelled = list(points.split(100))
model = qwrap.load("float.onnx")
qwrap.prepare(model, qwrap.QConfig(weight="int4", scope="kernels"))
qwrap.calibrate(model, unlabelled, progress=False)

test_points, test_arms = spirals(4000, seed=1)
teacher = qwrap.train.teacher_of(model)  # the float model that was prepared


def show(what: str, network: torch.nn.Module) -> tuple[float, float]:
    """Return the distance from the teacher's logits, and how many arms are right."""
    with torch.no_grad():
        logits, wanted = network(test_points), teacher(test_points)
    distance = ((logits - wanted).square().mean() / wanted.var()).item()
    accuracy = (logits.argmax(1) == test_arms).float().mean().item()
    print(f"{what:10} distance {distance:.5f}, accuracy {accuracy:.2%}")
    return distance, accuracy


show("float", teacher)
calibrated, _ = show("calibrated", model)

# 3. Train towards the float model's outputs. A fifth of the batches is held out; the state that is
#    best there is kept, and if none is better than before, nothing has changed.
report = qwrap.finetune(model, unlabelled, steps=400, progress=False)
print(report)
tuned, accuracy = show("fine-tuned", model)
assert report.improved
assert tuned < 0.5 * calibrated

# 4. The same in a loop of one's own. ``loss.total`` may be added to any other loss; where the model
#    is part of a larger module, run that one, then ask for ``distillation.loss()``.
looped = qwrap.load("float.onnx")
qwrap.prepare(looped, qwrap.QConfig(weight="int4", scope="kernels"))
qwrap.calibrate(looped, unlabelled, progress=False)
groups = qwrap.param_groups(looped, lr=1e-3, scale_lr=1e-3)
optimizer = torch.optim.Adam(groups)
with qwrap.Distillation(looped, outputs="kl", block_weight=0.5) as distillation:
    print("compared:", ", ".join(distillation.blocks), "and the outputs")
    for batch in unlabelled * 5:
        optimizer.zero_grad()
        loss = distillation(batch)
        loss.total.backward()
        optimizer.step()
own, _ = show("own loop", looped)
assert own < calibrated

# 5. What was trained is what is deployed.
qwrap.export(model, "tuned.onnx")
session = onnxruntime.InferenceSession("tuned.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {"points": test_points.numpy()})
deployed = (torch.from_numpy(logits).argmax(1) == test_arms).float().mean().item()
print(f"onnxruntime: accuracy {deployed:.2%}")
assert abs(deployed - accuracy) < 0.002
