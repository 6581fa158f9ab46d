"""Fine-tune an ONNX file in PyTorch and write it back, on a small network made here.

Run it in any folder: ``python tutorials/fine_tuning.py``. It leaves ``base.onnx`` and
``tuned.onnx`` there.
"""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

import qwrap

# 1. A file to start from: three linear layers named as exporters do, with the activation in a
#    function of the model. Any other file will do.
proto = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17, "local": 1]>
    base (float[N, 2] points) => (float[N, 2] logits) {
        ["/body/0/Gemm"] a = Gemm(points, "body.0.weight", "body.0.bias")
        ["/body/1/swish"] b = local.swish(a)
        ["/body/2/Gemm"] c = Gemm(b, "body.2.weight", "body.2.bias")
        ["/body/3/swish"] d = local.swish(c)
        ["/head/Gemm"] logits = Gemm(d, "head.weight", "head.bias")
    }
    <domain: "local", opset_import: ["": 17]>
    swish (x) => (y) { s = Sigmoid(x)  y = Mul(x, s) }
""")
rng = np.random.default_rng(0)
for name, rows, columns in (("body.0", 2, 32), ("body.2", 32, 32), ("head", 32, 2)):
    weight = rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
    bias = np.zeros(columns, np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
    proto.graph.initializer.append(numpy_helper.from_array(bias, f"{name}.bias"))
onnx.save(proto, "base.onnx")

# 2. Look. Scopes of node names are Blocks, a function call is one too; weights keep their names.
model = qwrap.load("base.onnx")
print(model)
assert dict(model.named_parameters()).keys() == {t.name for t in proto.graph.initializer}

# 3. Freeze. What ``parameters`` names is trained; all else becomes a buffer, which no optimizer
#    sees. Here the first layer stays as it is.
model = qwrap.load("base.onnx", parameters=["body.2.*", "head.*"])
print("trained:", [name for name, _ in model.named_parameters()])
print("frozen: ", [name for name, _ in model.named_buffers()])

# 4. Train, in a plain loop: is a point inside the circle?
torch.manual_seed(0)
points = 2 * torch.rand(2000, 2) - 1
labels = (points.square().sum(1) < 0.6).long()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for epoch in range(20):
    for part in torch.randperm(len(points)).split(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(points[part]), labels[part])
        loss.backward()
        optimizer.step()
    if epoch == 9:  # a checkpoint, as of any module
        torch.save(model.state_dict(), "checkpoint.pt")
accuracy = (model(points).argmax(1) == labels).float().mean().item()
print(f"accuracy: {accuracy:.4f}")
assert accuracy > 0.95

# 5. Resume: the checkpoint fits the same file, loaded the same way.
resumed = qwrap.load("base.onnx", parameters=["body.2.*", "head.*"])
resumed.load_state_dict(torch.load("checkpoint.pt"))

# 6. Watch a tensor of the graph by its ONNX name, while the model runs.
seen: list[torch.Tensor] = []
with torch.no_grad(), model.watching({"d": seen.append}):
    model(points)
print(f"hidden activations: {seen[0].mean():.3f} on average, {seen[0].max():.3f} at most")

# 7. Write it back: the same nodes and function, and onnxruntime computes what the module does.
qwrap.export(model, "tuned.onnx")
tuned = onnx.load("tuned.onnx")
pairs = zip(proto.graph.initializer, tuned.graph.initializer, strict=True)
changed = [old.name for old, new in pairs if old != new]
print("changed initialisers:", changed)
assert changed == ["body.2.weight", "body.2.bias", "head.weight", "head.bias"]
del proto.graph.initializer[:], tuned.graph.initializer[:]
assert tuned == proto

session = onnxruntime.InferenceSession("tuned.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {"points": points.numpy()})
difference = np.abs(logits - model(points).detach().numpy()).max()
print(f"largest difference from onnxruntime: {difference:.2g}")
assert difference < 1e-4  # float32, logits around 10
