"""The simulation of a wrapped model against the exported file in onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor

from qwrap.model.batches import count_batches, iterate
from qwrap.model.points import Program
from qwrap.model.shards import check_unsharded
from qwrap.model.wrapped import WrappedModel
from qwrap.verify.qdq_file import QdqFile, QuantizedTensor
from qwrap.verify.report import LevelReport, SkippedTensor, VerifyReport
from qwrap.verify.runtime import Runtime, to_feed
from qwrap.verify.session import Array, Mode
from qwrap.verify.simulation import Simulation, training_form
from qwrap.verify.tally import OutputTally, TensorTally, add_outputs

T = TypeVar("T")

EXACT = "exact"
NO_EXACT = "the model has no exact program; the deployed level ran its training form"
DISTURBED = (
    "returning the codes changed what the optimised file computes: its figures by tensor hold for "
    "the copy that returns them only"
)

UNFUSED = (
    "onnxruntime opens the file only with session.disable_quant_qdq=1, as its optimiser makes "
    "integer kernels for types that they do not take; the deployed level ran the training form"
)
HALF = (
    "the file casts to float16: where onnxruntime has no kernel of that type, as for most "
    "operators on CPUs, it computes in float32 and rounds constants alone, while the simulation "
    "rounds every tensor as the file says; codes behind such nodes may be a step apart"
)
ISOLATED = "every tensor was computed from onnxruntime's own values of the tensors before it"


def verify(
    model: WrappedModel,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    tensors: bool = True,
    isolated: bool = False,
    progress: bool = True,
) -> VerifyReport:
    """Compare what ``model`` simulates with what onnxruntime computes from the exported file.

    Two levels. *Specification*: the training form (float operators between fake-quantizers)
    against the file as written, without any graph optimisation: both then do the same arithmetic,
    and a difference beyond float rounding is a wrong scale, weight or place. *Deployed*: the exact
    simulation against the file with all optimisations, as users run it. Quantized tensors are
    compared by their codes. A difference travels on to what is computed from it, so the first
    tensor that differs is the one to look at; ``isolated`` keeps it from travelling. One batch is
    held at a time.

    Args:
        model: prepared and calibrated; not changed.
        path: the QDQ file exported from it.
        batches: as for ``calibrate``; labels and the like are ignored.
        tensors: compare quantized tensors too, not the graph outputs alone.
        isolated: compute every tensor from onnxruntime's own values of the tensors before it, so
            that each operator, or fused group, is judged by itself. Quantized graph outputs are
            then onnxruntime's.
        progress: show a progress bar.

    Raises:
        ModelError: the file is missing, invalid or refused by onnxruntime, or has other inputs,
            outputs or shapes than the model; or the parameters are sharded.
        InputError: there are no batches, or one does not fit.
    """
    check_unsharded(model)
    file = QdqFile(path)
    file.check_interface(model.graph, "the model")
    chosen, skipped = file.tensors(model.graph) if tensors else ((), ())
    exact = EXACT in model.programs
    with ExitStack() as stack:
        form = training_form(model)
        literal, optimised = (Runtime(file, mode, chosen) for mode in Mode)
        specification = Level(literal, model, form, chosen, stack, isolated=isolated)
        fused = exact and not optimised.unfused
        program = model.programs[EXACT]() if fused else form
        deployed = Level(optimised, model, program, chosen, stack, isolated=isolated)
        # What was prepared, not what algorithms have made of its weights since.
        float_model = Simulation(WrappedModel(model.graph), Program(), stack)
        quantization = [OutputTally(name) for name in file.outputs]
        count = 0
        for inputs in track(iterate(batches, model), batches, progress):
            count += 1
            feed = to_feed(inputs)
            specification.add(inputs, feed)
            outputs = deployed.add(inputs, feed)
            add_outputs(quantization, reference=float_model.run(inputs), other=outputs)
    notes = (
        (NO_EXACT, not exact),
        (UNFUSED, optimised.unfused),
        (DISTURBED, optimised.disturbed),
        (HALF, file.casts_to_half),
        (ISOLATED, isolated and bool(chosen)),
    )
    return VerifyReport(
        specification=specification.report("specification", "training form"),
        deployed=deployed.report("deployed", "exact simulation" if fused else "training form"),
        quantization=tuple(tally.report() for tally in quantization),
        skipped=(*skipped, *specification.unseen()),
        notes=tuple(note for note, holds in notes if holds),
        batches=count,
    )


class Level:
    """One program of the model beside one mode of onnxruntime.

    Attributes:
        runtime: that mode.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: WrappedModel,
        program: Program,
        tensors: Sequence[QuantizedTensor],
        stack: ExitStack,
        *,
        isolated: bool,
    ) -> None:
        """Prepare the simulation, which runs until ``stack`` closes."""
        self.runtime = runtime
        self._tensors = [TensorTally(tensor) for tensor in tensors]
        self._outputs = [OutputTally(name) for name in model.output_names]
        self._simulation = Simulation(model, program, stack, self._tensors, isolated=isolated)

    def add(self, inputs: Mapping[str, Tensor], feed: Mapping[str, Array]) -> dict[str, Tensor]:
        """Compare one batch; return onnxruntime's graph outputs."""
        outputs, codes = self.runtime.run(feed)
        add_outputs(self._outputs, reference=outputs, other=self._simulation.run(inputs, codes))
        return outputs

    def report(self, name: str, simulation: str) -> LevelReport:
        """Return the figures so far."""
        found = (tally.report() for tally in self._tensors)
        return LevelReport(
            name=name,
            simulation=simulation,
            runtime=self.runtime.mode.value,
            tensors=tuple(tensor for tensor in found if tensor is not None),
            outputs=tuple(tally.report() for tally in self._outputs),
        )

    def unseen(self) -> list[SkippedTensor]:
        """Return the tensors that the simulation never computed."""
        reason = "the model does not compute it"
        tallies = (tally for tally in self._tensors if tally.report() is None)
        return [SkippedTensor(name=tally.tensor.name, reason=reason) for tally in tallies]


def track(items: Iterator[T], source: object, progress: bool) -> Iterable[T]:
    """Return ``items`` behind a progress bar, which stays away where there is no terminal."""
    from tqdm import tqdm  # only who verifies pays for the import

    bar: Iterable[T] = tqdm(
        items,
        "verifying",
        count_batches(source),
        unit="batch",
        leave=False,
        disable=None if progress else True,
    )
    return bar
