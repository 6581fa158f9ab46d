"""Quantization-aware training by several processes, with DistributedDataParallel.

Run it in any folder: ``torchrun --nproc_per_node 2 tutorials/qat_ddp.py``, or with ``python`` as
one process. It leaves ``digits.int2.onnx`` there.
"""

import os

import onnxruntime
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qwrap
from qwrap.demo import batches, digits, model_path

STEPS, BATCH = 30, 32
if "RANK" in os.environ:
    dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
images, labels = (torch.from_numpy(array) for array in digits("train"))
test_images, test_labels = (torch.from_numpy(array[:500]) for array in digits("validation"))


def accuracy(logits: torch.Tensor) -> float:
    """Return the share of the test images that have the largest logit at their label."""
    return (logits.argmax(1) == test_labels).float().mean().item()


# 1. Prepare on every rank, with the same settings. Each rank calibrates with its own share of the
#    data, and all get the scales that one process gets from all of it.
model = qwrap.load(model_path())
qwrap.prepare(model, qwrap.QConfig(weight="int2", first_last_8bit=True, scope="kernels"))
qwrap.calibrate(model, batches("calibration")[:4][rank::world])
with torch.no_grad():
    calibrated = accuracy(model.eval()(test_images))

# 2. Wrap and train. Gradients of weights and scales are averaged alike.
parallel = DistributedDataParallel(model.train()) if world > 1 else model
optimizer = torch.optim.AdamW(
    qwrap.param_groups(parallel, lr=2e-3, weight_decay=1e-4, scale_lr=1e-2)
)
schedule = qwrap.train.Schedule(model, STEPS, learn_scales=0.1)
generator = torch.Generator().manual_seed(0)
for _ in range(STEPS):
    part = torch.randint(len(images), (BATCH,), generator=generator)[rank::world]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(parallel(images[part]), labels[part]).backward()
    optimizer.step()
    schedule.step()
del parallel  # it uses the process group, which is to be closed at the end

# 3. All ranks hold the same model.
if world > 1:
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)

# 4. The first one exports it.
if rank == 0:
    qwrap.export(model.eval(), "digits.int2.onnx")
    report = qwrap.verify(model, "digits.int2.onnx", batches("validation")[:2])
    assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

    session = onnxruntime.InferenceSession("digits.int2.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": test_images.numpy()})
    trained = accuracy(torch.from_numpy(logits))
    print(f"accuracy in onnxruntime: {trained:.3f}; calibrated only: {calibrated:.3f}")
    assert trained > calibrated + 0.1
if dist.is_initialized():
    dist.barrier()  # the others wait for the first
    dist.destroy_process_group()
