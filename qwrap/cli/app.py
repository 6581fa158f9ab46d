"""The commands and their options; each only translates to the public functions of qwrap."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

import qwrap
from qwrap.cli.inspection import file_size, inspect_model, print_inspection
from qwrap.cli.plan import print_plan
from qwrap.cli.settings import config_of, weight_type
from qwrap.cli.verification import FirstBatches, Thresholds, verify_summary
from qwrap.config import METHODS
from qwrap.data import Batches, graph_inputs, open_data, read_preprocessing
from qwrap.errors import ConfigError, ExportError, QwrapError
from qwrap.graph.save import check_target
from qwrap.improve.guard import MIN_SQNR
from qwrap.quant.tables import FORMS
from qwrap.targets import TARGETS
from qwrap.verify import verify_files

BEYOND_THRESHOLD = 1
USER_ERROR = 2


class Shell(TyperGroup):
    """A command group that reports a ``QwrapError`` as one line on stderr, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except QwrapError as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(USER_ERROR) from error


app = typer.Typer(
    cls=Shell,
    help="Quantize any ONNX model in PyTorch, exactly as onnxruntime will run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Float ONNX file.")]
DATA_HELP = (
    "Folder of images, .npz or .npy file (or a folder of them; arrays named after the graph "
    "inputs), or module:function that returns batches."
)
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME|FILE",
        help="How images become inputs: imagenet, unit (0..1), tf (-1..1), raw (0..255), caffe, "
        "or a JSON/TOML file.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Use at most so many samples.")]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Samples in a batch; default: the model's, else 16."),
]
MaxDiffering = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit 1 if a larger share of the codes differs."),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(
        metavar="DB", help="Exit 1 if the quantized outputs are further from the float ones."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Activation = Annotated[
    str | None,
    typer.Option(
        "--activation", help="Type of activations, as in uint8; 'none' quantizes weights alone."
    ),
]
Weight = Annotated[str | None, typer.Option("--weight", help="Type of weights, as in int8.")]
BlockSize = Annotated[
    int | None, typer.Option("--block-size", min=1, help="Weights that share a scale, as in 32.")
]
Contrib = Annotated[
    bool | None,
    typer.Option("--contrib", help="Write com.microsoft's operators instead of raising the opset."),
]
PerChannel = Annotated[
    bool | None,
    typer.Option("--per-channel/--no-per-channel", help="One weight scale per channel."),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help=f"Ranges of activations: {', '.join(METHODS)} or auto."),
]
WeightMethod = Annotated[
    str | None, typer.Option("--weight-method", help="Ranges of weights: mse or minmax.")
]
Percentile = Annotated[
    float | None,
    typer.Option("--percentile", help="Values in range with --method percentile, in percent."),
]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        help='Quantize what is "faster" in integers, all that has "kernels", or "all".',
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=f"Runtime that the file is for, which decides what types suit: {', '.join(TARGETS)}.",
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="What was observed: read instead of observing the same data again, made if there is "
        "no such file (.json for text). Without --calibration weights are not improved.",
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Ranges and scales in a file of onnxruntime, TensorRT, AIMET or QNN; stands for "
        "--calibration where it has all tensors.",
    ),
]
WriteTable = Annotated[
    Path | None,
    typer.Option("--write-table", metavar="FILE", help="Write ranges and scales to such a file."),
]
TableForm = Annotated[
    str | None,
    typer.Option("--table-form", help=f"Form of --write-table: {', '.join(FORMS)}."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave nodes of this name or operator type float; repeatable.",
    ),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NODES=TYPES",
        help="Quantize nodes in other types, by name, pattern, operator type, Block or tensor: "
        "'/encoder/layer.3/*=uint16', 'Conv=uint8/int4' with a type for weights, 'fc=/int4' with "
        "that alone, 'a to b=float32' for all between two nodes; repeatable, later ones win.",
    ),
]
Finetune = Annotated[
    int | None,
    typer.Option(
        "--finetune",
        metavar="STEPS",
        min=1,
        help="Train towards the float model's outputs on the calibration data, without labels; "
        "some hundreds of steps. Kept only where held-out batches come closer.",
    ),
]
Effort = Annotated[
    Literal["none", "default", "high"],
    typer.Option(
        "--effort",
        help="What to do for accuracy behind calibration: nothing, seconds, or minutes of learning "
        "how to round weights.",
    ),
]
Guard = Annotated[
    float,
    typer.Option(
        "--guard",
        metavar="DB",
        help="Return layers to float, as few as can be, until the outputs are that close to the "
        "float ones; -inf for no bound.",
    ),
]


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the QDQ file.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", metavar="DATA", help=DATA_HELP)
    ] = None,
    statistics: Statistics = None,
    table: Table = None,
    write_table: WriteTable = None,
    table_form: TableForm = None,
    preset: Preset = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    target: Target = None,
    activation: Activation = None,
    weight: Weight = None,
    block_size: BlockSize = None,
    contrib: Contrib = None,
    per_channel: PerChannel = None,
    method: Method = None,
    weight_method: WeightMethod = None,
    percentile: Percentile = None,
    scope: Scope = None,
    exclude: Exclude = None,
    regions: Regions = None,
    effort: Effort = "default",
    guard: Guard = MIN_SQNR,
    finetune: Finetune = None,
    verify: Annotated[
        int,
        typer.Option("--verify", metavar="N", min=0, help="Batches to verify on; 0: none."),
    ] = 8,
    max_differing: MaxDiffering = None,
    min_sqnr: MinSqnr = None,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL with the ranges that calibration data shows."""
    config = config_of(
        regions,
        target=target,
        activation=activation,
        weight=weight_type(weight, block_size),
        contrib=contrib,
        per_channel=per_channel,
        method=method,
        weight_method=weight_method,
        percentile=percentile,
        scope=scope,
        excluded=exclude,
    )
    thresholds = Thresholds(max_differing=max_differing, min_sqnr=min_sqnr)
    if thresholds != Thresholds() and (calibration is None or not verify):
        cause = "--verify 0" if not verify else "no --calibration"
        raise ConfigError(f"{cause} leaves nothing to hold --max-differing or --min-sqnr against")
    if not any((calibration, statistics, table)) and config.activation is not None:
        raise ConfigError("give --calibration DATA, --statistics or --table FILE with ranges")
    _check_table(write_table, table_form)
    console = Console(quiet=quiet, highlight=False)
    batches = None
    if calibration is not None:
        batches = FirstBatches(open_batches(model, calibration, preset, limit, batch_size), verify)
    wrapped = qwrap.quantize(
        model,
        output,
        calibration=batches,
        statistics=statistics,
        table=table,
        config=config,
        effort=effort,
        min_sqnr=guard,
        finetune=finetune,
        progress=not quiet,
    )
    assert isinstance(wrapped.plan, qwrap.QuantPlan)
    print_plan(wrapped.plan, console)
    show(console, f"{output}: {size_text(model, output)}")
    if write_table is not None and table_form is not None:
        qwrap.RangeTable.of(wrapped).write(write_table, table_form)
    if batches is None:
        show(console, "not verified: without --calibration there is no data to run")
    elif verify:
        report = qwrap.verify(wrapped, output, batches.kept, progress=not quiet)
        files = verify_files(model, output, batches.kept, progress=False)
        show(console, verify_summary(report, files))
        _fail(thresholds.failures(differing=report.deployed.fraction, sqnr=files.sqnr))


@app.command()
def verify(
    model: Model,
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="What was made of it.")],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=DATA_HELP)],
    preset: Preset = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    max_differing: MaxDiffering = None,
    min_sqnr: MinSqnr = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare QUANTIZED with MODEL, and its integer kernels with what it says, in onnxruntime."""
    batches = open_batches(model, data, preset, limit, batch_size)
    report = verify_files(model, quantized, batches, progress=not quiet)
    show(Console(quiet=quiet, highlight=False), str(report))
    if json_file is not None:
        _write_json(json_file, report.to_dict())
    thresholds = Thresholds(max_differing=max_differing, min_sqnr=min_sqnr)
    _fail(thresholds.failures(differing=report.optimisation.fraction, sqnr=report.sqnr))


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show operators, opset, size, inputs and outputs of MODEL, and what would be quantized."""
    facts, plan = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_inspection(facts, plan, Console(highlight=False))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path(
        "qwrap-demo"
    ),
) -> None:
    """Quantize a small digit classifier and show float against int8."""
    from qwrap.demo.run import run_demo

    run_demo(output, Console(highlight=False))


def main() -> None:
    """Run the shell."""
    app(prog_name="qwrap")


def open_batches(
    model: Path, data: str, preset: str | None, limit: int | None, batch_size: int | None
) -> Batches:
    """Return the samples that the options name as batches for a model."""
    return open_data(
        data,
        graph_inputs(model),
        preprocessing=None if preset is None else read_preprocessing(preset),
        limit=limit,
        batch_size=batch_size,
    )


def _check_table(path: Path | None, form: str | None) -> None:
    """Refuse a table that cannot be written, before any work is done for it."""
    if (path is None) != (form is None):
        raise ConfigError("--write-table and --table-form go together; give both or neither")
    if form is not None and form not in FORMS:
        raise ConfigError(f"--table-form {form}: choose one of {', '.join(FORMS)}")
    if path is not None:
        check_target(path)


def show(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(text, markup=False, soft_wrap=True)


def size_text(before: Path, after: Path) -> str:
    """Say how large a file is, and against the one that it was made of."""
    sizes = [file_size(path) for path in (before, after)]
    return f"{sizes[1]} bytes, {sizes[1] / sizes[0]:.2f} of {before}"


def _fail(failures: Iterable[str]) -> None:
    """Report what is beyond a limit, and exit if anything is."""
    failures = list(failures)
    for failure in failures:
        typer.echo(failure, err=True)
    if failures:
        raise typer.Exit(BEYOND_THRESHOLD)


def _write_json(path: Path, content: object) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from error
