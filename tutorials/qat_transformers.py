"""Quantization-aware training with the Trainer of transformers: an ONNX encoder in a user's module.

Run it in any folder: ``python tutorials/qat_transformers.py``. It leaves ``encoder.onnx``,
``encoder.int8.onnx`` and the folder ``checkpoints`` there.
"""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

import qwrap

WORDS, LENGTH, WIDTH, STEPS = 20, 12, 32, 60

# 1. A file to start from: one layer of a transformer encoder. Any other encoder will do.
proto = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17]>
    encoder (int64[N, L] input_ids, int64[N, L] attention_mask) => (float[N, L, 32] hidden) {
        ["/embeddings/Gather"] x = Gather(words, input_ids)
        axes = Constant <value_ints: ints = [1]> ()
        one = Constant <value_float: float = 1.0> ()
        far = Constant <value_float: float = -10000.0> ()
        root = Constant <value_float: float = 0.177> ()
        ["/mask/Cast"] seen = Cast <to = 1> (attention_mask)
        ["/mask/Sub"] hidden_words = Sub(one, seen)
        ["/mask/Mul"] masked = Mul(hidden_words, far)
        ["/mask/Unsqueeze"] mask = Unsqueeze(masked, axes)
        ["/layer/query/MatMul"] q = MatMul(x, query)
        ["/layer/key/MatMul"] k = MatMul(x, key)
        ["/layer/key/Transpose"] kt = Transpose <perm = [0, 2, 1]> (k)
        ["/layer/value/MatMul"] v = MatMul(x, value)
        ["/layer/scores/MatMul"] qk = MatMul(q, kt)
        ["/layer/scores/Mul"] scaled = Mul(qk, root)
        ["/layer/scores/Add"] scores = Add(scaled, mask)
        ["/layer/Softmax"] weights = Softmax <axis = -1> (scores)
        ["/layer/MatMul"] mixed = MatMul(weights, v)
        ["/layer/Add"] a = Add(x, mixed)
        ["/layer/up/MatMul"] b = MatMul(a, up)
        ["/layer/Relu"] c = Relu(b)
        ["/layer/down/MatMul"] d = MatMul(c, down)
        ["/layer/Add_1"] hidden = Add(a, d)
    }
""")
rng = np.random.default_rng(0)
shapes = dict.fromkeys(("query", "key", "value", "up", "down"), (WIDTH, WIDTH))
for name, shape in {"words": (WORDS, WIDTH), **shapes}.items():
    weight = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, name))
onnx.save(proto, "encoder.onnx")


# 2. Data: are most words of the first half of the vocabulary?
def sample() -> dict[str, np.ndarray]:
    """Return a padded sentence and its label."""
    length = int(rng.integers(5, LENGTH + 1))
    ids, mask = rng.integers(0, WORDS, LENGTH), np.arange(LENGTH) < length
    label = np.int64((ids[mask] < WORDS // 2).mean() > 0.5)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": label}


train_data, test_data = [sample() for _ in range(1000)], [sample() for _ in range(500)]


class Classifier(nn.Module):
    """The encoder, the mean over the words of a sentence, and a new layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the logits, and the loss if there are labels."""
        hidden = self.encoder(input_ids, attention_mask)
        logits = self.head(mean(hidden, attention_mask))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the words that the mask does not hide."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


# 3. Prepare and calibrate the encoder; the Trainer gets the module that it is part of.
def classifier() -> Classifier:
    """Return the classifier with 8-bit matrix products in its encoder."""
    set_seed(0)
    encoder = qwrap.load("encoder.onnx")
    qwrap.prepare(encoder, qwrap.QConfig(scope="kernels"))
    return Classifier(encoder)


def trainer_of(model: Classifier) -> Trainer:
    """Return a Trainer with the parameters in groups; all else is as for any module."""
    settings = TrainingArguments(
        "checkpoints",
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=32,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    groups = qwrap.param_groups(model, lr=5e-3, weight_decay=1e-2, scale_lr=1e-3)
    return Trainer(
        model, settings, train_dataset=train_data, optimizers=(torch.optim.AdamW(groups), None)
    )


model = classifier()
calibration = [default_data_collator(train_data[i : i + 50]) for i in range(0, 200, 50)]
for batch in calibration:
    del batch["labels"]  # batches of a mapping name graph inputs alone
qwrap.calibrate(model.encoder, calibration)
trainer_of(model).train()

# 4. Resume in a new object: the checkpoint brings scales and statistics along.
resumed = classifier()
trainer_of(resumed).train(resume_from_checkpoint=f"checkpoints/checkpoint-{STEPS // 2}")
pairs = zip(model.parameters(), resumed.parameters(), strict=True)
assert all(torch.equal(one, other) for one, other in pairs)

# 5. Export the encoder; the head stays in PyTorch.
model.eval()
qwrap.export(model.encoder, "encoder.int8.onnx")
report = qwrap.verify(model.encoder, "encoder.int8.onnx", calibration[:1])
assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

test = default_data_collator(test_data)
inputs = {name: test[name].numpy() for name in ("input_ids", "attention_mask")}
session = onnxruntime.InferenceSession("encoder.int8.onnx", providers=["CPUExecutionProvider"])
(hidden,) = session.run(None, inputs)
with torch.no_grad():
    logits = model.head(mean(torch.from_numpy(hidden), test["attention_mask"]))
accuracy = (logits.argmax(1) == test["labels"]).float().mean().item()
print(f"accuracy with the encoder in onnxruntime: {accuracy:.3f}")
assert accuracy > 0.9
