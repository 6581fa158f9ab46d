"""Print what quantized key-value caches cost: perplexity, bytes, drift and latency.

    python scripts/bench_kv_cache.py [--shared DIR] [--stories N] [--skip-latency]

The decoder is stories260k of the shared models, exported once more with caches at its inputs and
outputs (it has none in the file), so that its weights are real. Perplexity and bytes are those of
held-back stories of 256 tokens, scales those of 32 texts of 512. Drift is the signal to noise ratio
of the logits, teacher forced one token at a time, in the first and in the last quarter of 512
tokens, in dB. Latency is that of one step of a decoder of random weights, 4 layers of 8 heads of 64
channels, one thread, over that of the float file, which is measured in turns with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from networks.exporting import quiet
from networks.llama import Llama
from onnx import numpy_helper
from shared_models import SharedModels, default_folder

import qwrap

Arrays = dict[str, np.ndarray]
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "int8": {},
    "int8, all per tensor": {"keys": "tensor", "values": "tensor"},
    "int8, all per head": {"values": "head"},
    "int8, all per channel": {"keys": "channel"},
    "uint8, zero points": {"dtype": "uint8", "symmetric": False},
    "int4": {"dtype": "int4"},
    "int4, all per head": {"dtype": "int4", "keys": "head", "values": "head"},
    "uint4, zero points": {"dtype": "uint4", "symmetric": False},
    "uint4, zero points, mse": {"dtype": "uint4", "symmetric": False, "method": "mse"},
}
NUMPY = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
PASTS, STEPS, REPEATS = (64, 512, 2048), 512, 24
PRODUCTS = (
    *(f"self_attn.{letter}" for letter in "qkvo"),
    *(f"mlp.{name}" for name in ("gate", "up", "down")),
)
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, WORDS = 5, 8, 4, 64, 172, 512


def stories_network(path: Path) -> Llama:
    """Return the network that the shared file was exported from."""
    model = onnx.load(path)
    arrays = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }
    products = iter([
        arrays[node.input[1]].T
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    ])
    table = arrays["m.lm_head.weight"]
    state = {"embed_tokens.weight": table, "lm_head.weight": table}
    state["norm.weight"] = arrays["m.model.norm.weight"]
    for i in range(LAYERS):
        for name in PRODUCTS:
            state[f"layers.{i}.{name}_proj.weight"] = next(products)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"layers.{i}.{name}.weight"] = arrays[f"m.model.layers.{i}.{name}.weight"]
    network = Llama(WORDS, LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, epsilon=1e-5)
    network.load_state_dict(state)
    return network.eval()


def export(network: Llama, path: Path) -> None:
    """Write a decoder with caches, named as other exporters name them."""
    attention = network.layers[0].self_attn
    slots = [f"{i}.{what}" for i in range(len(network.layers)) for what in ("key", "value")]
    pasts = [f"past_key_values.{slot}" for slot in slots]
    presents = [f"present.{slot}" for slot in slots]
    caches = [torch.randn(2, attention.kv_heads, 3, attention.size) for _ in slots]
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "logits": {0: "batch", 1: "tokens"}}
    axes |= {name: {0: "batch", 2: "past"} for name in pasts}
    axes |= {name: {0: "batch", 2: "all"} for name in presents}
    with quiet():
        torch.onnx.export(
            network,
            (torch.ones(2, 5, dtype=torch.int64), *caches),
            path,
            input_names=["input_ids", *pasts],
            output_names=["logits", *presents],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


class Decoder:
    """A file in onnxruntime, on one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._caches = [i for i in self._session.get_inputs() if i.name != "input_ids"]

    def caches(self, length: int) -> Arrays:
        """Caches of one sequence of some length."""
        return {
            c.name: np.ones((1, c.shape[1], length, c.shape[3]), NUMPY[c.type])
            for c in self._caches
        }

    @property
    def bytes_per_token(self) -> int:
        """What the caches grow by."""
        return sum(array.nbytes for array in self.caches(1).values())

    def run(self, ids: np.ndarray, caches: Arrays) -> tuple[np.ndarray, Arrays]:
        """Logits, and the caches after these tokens."""
        logits, *presents = self._session.run(None, {"input_ids": ids, **caches})
        return logits, dict(zip(caches, presents, strict=True))

    def perplexity(self, stories: Sequence[np.ndarray]) -> float:
        """Perplexity of the tokens behind the first of each story."""
        losses = []
        for ids in stories:
            logits, _ = self.run(ids, self.caches(0))
            wide = torch.from_numpy(logits[0, :-1]).double()
            losses.append(torch.nn.functional.cross_entropy(wide, torch.from_numpy(ids[0, 1:])))
        return float(torch.stack(losses).mean().exp())

    def steps(self, ids: np.ndarray) -> np.ndarray:
        """Logits of a sequence, token by token."""
        caches, found = self.caches(0), []
        for step in range(ids.shape[1]):
            logits, caches = self.run(ids[:, step : step + 1], caches)
            found.append(logits[0, 0])
        return np.stack(found)


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise ratio in dB."""
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum()))


def quality(shared: SharedModels, count: int, folder: Path) -> None:
    """Print perplexity, bytes and drift on the stories."""
    source = folder / "stories.onnx"
    export(stories_network(shared.path("stories260k")), source)
    pieces = [sample["input_ids"] for sample in shared.calibration("stories260k", 64)]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    batches = [{"input_ids": np.concatenate(pair, 1)} for pair in pairs]  # as long as what is run
    stories = [sample["input_ids"] for sample in shared.validation("stories260k", count)]
    teacher, long = Decoder(source), np.concatenate(stories[:2], 1)[:, :STEPS]
    expected, part = teacher.steps(long), STEPS // 4
    print(f"{'cache':<36} {'perplexity':>10} {'bytes/token':>11} {'first':>6} {'last':>6}")
    print(f"{'float32':<36} {teacher.perplexity(stories):10.4f} {teacher.bytes_per_token:11d}")
    for name, settings in SETTINGS.items():
        target = folder / "quantized.onnx"
        qwrap.quantize_kv_cache(source, target, batches, progress=False, **settings)
        decoder = Decoder(target)
        found = decoder.steps(long)
        ends = sqnr(expected[:part], found[:part]), sqnr(expected[-part:], found[-part:])
        print(
            f"{name:<36} {decoder.perplexity(stories):10.4f} {decoder.bytes_per_token:11d} "
            f"{ends[0]:6.1f} {ends[1]:6.1f}",
            flush=True,
        )


def latency(folder: Path) -> None:
    """Print what a step takes over that of the float file."""
    source, decoders = folder / "float.onnx", dict[str, Decoder]()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        export(Llama(2000, 4, 512, 8, 8, 1376).eval(), source)
    decoders["float32"] = Decoder(source)
    batches = [{"input_ids": np.arange(32)[None]}]
    for name, settings in SETTINGS.items():
        if "mse" not in name:
            target = folder / "quantized.onnx"
            qwrap.quantize_kv_cache(source, target, batches, progress=False, **settings)
            decoders[name] = Decoder(target)
    times = [_times(decoders, past) for past in PASTS]
    print(f"\n{'one step at a past of':<36} " + " ".join(f"{past:>8}" for past in PASTS))
    for name in decoders:
        is_float = name == "float32"
        figures = [each[name] / (1 if is_float else each["float32"]) for each in times]
        unit = " ms" if is_float else ""
        print(f"{name:<36} " + " ".join(f"{figure:8.2f}" for figure in figures) + unit)


def _times(decoders: Mapping[str, Decoder], past: int) -> dict[str, float]:
    ids, found = np.ones((1, 1), np.int64), {name: list[float]() for name in decoders}
    caches = {name: decoder.caches(past) for name, decoder in decoders.items()}
    for _ in range(REPEATS):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.run(ids, caches[name])
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(each)) for name, each in found.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--skip-latency", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        quality(SharedModels(arguments.shared), arguments.stories, Path(folder))
        if not arguments.skip_latency:
            latency(Path(folder))


if __name__ == "__main__":
    main()
