"""One step of quantization-aware training against one float step: time and peak memory.

A step is forward, cross-entropy, backward and SGD with momentum, on random images. All variants of
a network take turns, step by step, so that other work on the machine meets them all; times are
medians over the rounds, ratios medians of the ratio within a round. On a machine that is shared
with others, ``--clock cpu`` counts what the process computed, not what it waited for.

- ``float``: the wrapped model with its stubs switched off. Batch normalisation is folded, so this
  is the quickest step there is to compare with.
- ``fixed``, ``lsq``: the same model at 8 bits, scales fixed or learned; passes compiled or eager.
- ``native``: the network as written, with batch normalisation.
- ``torch.ao``: that network after ``prepare_qat_fx`` with the default settings for x86, which
  observes, follows and fake-quantizes in one C++ kernel; it keeps batch normalisation and folds it
  into the weight in every step. Its ratio is to ``native``.

Peak memory is the most that torch's allocator has given out at a time during a step, weights,
gradients and optimizer state included, summed up from the events of the profiler: what
``torch.cuda.max_memory_allocated`` says on a GPU. The resident set of the process says less: the C
library keeps what was freed, so that it hangs on everything that ran before. What oneDNN allocates
inside a convolution is not counted, in any variant.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_forward import exported
from networks import NETWORKS, Network
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import qwrap
from qwrap import fused
from qwrap.quant.stubs import Switch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LR = 1e-4  # small, so that random images teach nothing that changes what is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of training a network.

    Attributes:
        module: what is trained.
        how: how fused passes are run.
        over: the variant that its figures are ratios to.
    """

    module: nn.Module
    how: fused.compiling.How = "auto"
    over: str = "float"


@dataclass(slots=True)
class Step:
    """One variant, ready to train.

    Attributes:
        variant: what is trained.
        images: float32 ``[N, 3, H, W]``.
        labels: int64 ``[N]``.
        seconds: of the steps measured so far.
        mebibytes: peak memory of a step.
    """

    variant: Variant
    images: Tensor
    labels: Tensor
    seconds: list[float] = field(default_factory=list)
    mebibytes: float = 0.0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.variant.module.train()
        parameters = self.variant.module.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9)

    def run(self) -> None:
        """Train one step."""
        with fused.use(self.variant.how):
            self.optimizer.zero_grad()
            logits = self.variant.module(self.images)
            nn.functional.cross_entropy(logits, self.labels).backward()
            self.optimizer.step()

    def measure_time(self, clock: Callable[[], float]) -> None:
        """Train one step and take down its time."""
        start = clock()
        self.run()
        self.seconds.append(clock() - start)

    def measure_memory(self) -> None:
        """Train one step and take down its peak memory."""
        self.optimizer.zero_grad()  # what lived before and dies in the step is not seen to die
        module, state = self.variant.module, self.optimizer.state.values()
        alive = [*module.parameters(), *module.buffers(), self.images]
        alive += [value for held in state for value in held.values() if isinstance(value, Tensor)]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.mebibytes = (sum(sizes.values()) + _most_given_out(self.run)) / 2**20


def _most_given_out(call: Callable[[], None]) -> int:
    """Return the most bytes that the allocator has given out beyond what it had when called."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as taken:
        call()
    assert taken.profiler is not None
    assert taken.profiler.kineto_results is not None
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def wrapped(path: Path, images: Tensor, training: str) -> qwrap.WrappedModel:
    """Return the model of a file, calibrated at 8 bits; as a float model for ``training`` float."""
    model = qwrap.load(path)
    by = "fixed" if training == "float" else training
    config = qwrap.QConfig(training=by, method="minmax", scope="kernels")
    qwrap.prepare(model, config)
    qwrap.calibrate(model, [images])
    if training == "float":
        for switch in model.modules():
            if isinstance(switch, Switch):
                switch.mode = "float"
    return model


def by_torch(native: nn.Module, images: Tensor) -> nn.Module:
    """Return ``native`` prepared for training by ``torch.ao.quantization``."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    mapping = get_default_qat_qconfig_mapping("x86")
    return quantize_fx.prepare_qat_fx(native.train(), mapping, (images,))


def variants(network: Network, path: Path, images: Tensor) -> dict[str, Variant]:
    """Return everything that is compared, by name."""
    found = {
        "float": Variant(module=wrapped(path, images, "float")),
        "fixed": Variant(module=wrapped(path, images, "fixed")),
        "lsq, compiled": Variant(module=wrapped(path, images, "lsq")),
        "lsq, eager": Variant(module=wrapped(path, images, "lsq"), how="eager"),
        "native": Variant(module=network.make(small=False), over="native"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        module = by_torch(network.make(small=False), images)
    return {**found, "torch.ao": Variant(module=module, over="native")}


def measure(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Step]:
    """Return the measured steps of one network."""
    network = NETWORKS[name]
    native = network.make(small=False)
    path = exported(network, native, arguments.workdir / f"{name}_torchscript.onnx", "torchscript")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, arguments.size, arguments.size, generator=generator)
    labels = torch.randint(1000, (batch,), generator=generator)
    steps = {
        key: Step(variant, images, labels)
        for key, variant in variants(network, path, images).items()
        if arguments.variants is None or key in arguments.variants
    }
    for step in steps.values():
        step.run()  # compiles, and makes the state of the optimizer
        step.run()
    for i in range(arguments.rounds):
        order = list(steps.values())
        for step in order if i % 2 else reversed(order):
            step.measure_time(CLOCKS[arguments.clock])
    for step in steps.values():
        step.measure_memory()
    return steps


def rows(name: str, batch: int, threads: int, steps: Mapping[str, Step]) -> Iterator[str]:
    """Yield the rows of the table."""
    for key, step in steps.items():
        base = steps.get(step.variant.over)
        ratios = ["", ""]
        if base is not None:
            pairs = zip(step.seconds, base.seconds, strict=True)
            ratios[0] = f"{statistics.median(a / b for a, b in pairs):.2f}"
            ratios[1] = f"{step.mebibytes / base.mebibytes:.2f}"
        milliseconds = statistics.median(step.seconds) * 1e3
        cells = [name, str(batch), str(threads), key, f"{milliseconds:.0f}", ratios[0]]
        yield f"| {' | '.join([*cells, f'{step.mebibytes:.0f}', ratios[1]])} |"


def header() -> str:
    """Return the head of the table."""
    cells = ["network", "batch", "threads", "step", "ms", "ratio", "peak MiB", "ratio"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = [name for name, network in NETWORKS.items() if not network.is_transformer]
    chosen = ["resnet18", "mobilenet_v2"]
    parser.add_argument("--networks", nargs="+", default=chosen, choices=images)
    parser.add_argument("--variants", nargs="+", help="names as in the table; all without this")
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--workdir", type=Path, default=Path("build/networks"), help="files stay")
    return parser.parse_args(argv)


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    print(header())
    for name in arguments.networks:
        for batch in arguments.batches:
            for count in arguments.threads:
                print(f"{name}, batch {batch}", file=sys.stderr)
                with threads(count):
                    steps = measure(name, batch, arguments)
                    print("\n".join(rows(name, batch, count, steps)), flush=True)


if __name__ == "__main__":
    main()
