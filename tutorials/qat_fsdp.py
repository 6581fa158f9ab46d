"""Quantization-aware training with FSDP2: parameters in shards, gathered Block by Block.

Run it in any folder: ``torchrun --nproc_per_node 2 tutorials/qat_fsdp.py``, or with ``python`` as
one process. It leaves ``digits.int2.onnx`` there.
"""

import os

import onnxruntime
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import qwrap
from qwrap.demo import batches, digits, model_path
from qwrap.model import Block

STEPS, BATCH = 30, 32
if "RANK" in os.environ:
    dist.init_process_group("gloo")  # "nccl" on GPUs
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, world = dist.get_rank(), dist.get_world_size()
images, labels = (torch.from_numpy(array) for array in digits("train"))
test_images, test_labels = (torch.from_numpy(array[:500]) for array in digits("validation"))


def accuracy(logits: torch.Tensor) -> float:
    """Return the share of the test images that have the largest logit at their label."""
    return (logits.argmax(1) == test_labels).float().mean().item()


def prepared() -> qwrap.WrappedModel:
    """Return the model with 2-bit weights, those next to input and output in 8 bits."""
    model = qwrap.load(model_path())
    config = qwrap.QConfig(weight="int2", first_last_8bit=True, scope="kernels")
    qwrap.prepare(model, config)
    return model


# 1. Prepare and calibrate before sharding. Each rank calibrates with its own share of the data.
model = prepared()
qwrap.calibrate(model, batches("calibration")[:4][rank::world])
with torch.no_grad():
    calibrated = accuracy(model.eval()(test_images))

# 2. Shard. The scopes of the file are Blocks: each is gathered when it runs, with its scales.
mesh = dist.init_device_mesh("cpu", (world,))
for block in model.children():
    if isinstance(block, Block):
        fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)

# 3. Train.
optimizer = torch.optim.AdamW(
    qwrap.param_groups(model.train(), lr=2e-3, weight_decay=1e-4, scale_lr=1e-2)
)
schedule = qwrap.train.Schedule(model, STEPS, learn_scales=0.1)
generator = torch.Generator().manual_seed(0)
for _ in range(STEPS):
    part = torch.randint(len(images), (BATCH,), generator=generator)[rank::world]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
    optimizer.step()
    schedule.step()

# 4. Gather the state, which every rank takes part in; the first one has it, and exports it from a
#    model in one piece.
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options)
dist.destroy_process_group()
if rank == 0:
    whole = prepared()
    whole.load_state_dict(state)
    qwrap.export(whole.eval(), "digits.int2.onnx")
    report = qwrap.verify(whole, "digits.int2.onnx", batches("validation")[:2])
    assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

    session = onnxruntime.InferenceSession("digits.int2.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": test_images.numpy()})
    trained = accuracy(torch.from_numpy(logits))
    print(f"accuracy in onnxruntime: {trained:.3f}; calibrated only: {calibrated:.3f}")
    assert trained > calibrated + 0.1
