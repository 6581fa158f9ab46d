"""The commands and their options; each only translates to the public functions of qwrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import qwrap
from qwrap.cli.inspection import inspect_model, inspection_text
from qwrap.cli.verification import Thresholds, verify_quantized
from qwrap.data import Batches, graph_inputs, open_data, read_preprocessing
from qwrap.errors import ExportError, QwrapError

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


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the QDQ file.")],
    calibration: Annotated[str, typer.Option("--calibration", metavar="DATA", help=DATA_HELP)],
    preset: Preset = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    activation: Annotated[
        str | None, typer.Option("--activation", help="Type of activations, as in uint8.")
    ] = None,
    weight: Annotated[
        str | None, typer.Option("--weight", help="Type of weights, as in int8.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Range search: mse, minmax or percentile.")
    ] = None,
    per_channel: Annotated[
        bool | None,
        typer.Option("--per-channel/--no-per-channel", help="One weight scale per channel."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Leave nodes of this name or operator type float; repeatable.",
        ),
    ] = None,
) -> None:
    """Quantize MODEL with the ranges that calibration data shows."""
    batches = _open(model, calibration, preset, limit, batch_size)
    # A default has one home, QConfig: only what was asked for is passed on.
    asked = {
        "activation": activation,
        "weight": weight,
        "method": method,
        "per_channel": per_channel,
    }
    config = qwrap.QConfig(**{key: value for key, value in asked.items() if value is not None})
    for pattern in exclude or ():
        config.exclude(pattern)
    qwrap.quantize(model, output, calibration=batches, config=config)
    before, after = model.stat().st_size, output.stat().st_size
    typer.echo(f"{output}: {after} bytes, {after / before:.2f} of {model}")


@app.command()
def verify(
    model: Model,
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="What was made of it.")],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=DATA_HELP)],
    preset: Preset = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    max_differing: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fail if a larger fraction of the codes differs."),
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Fail if the SQNR is lower.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
) -> None:
    """Compare the simulation of QUANTIZED with what onnxruntime computes; exit 1 beyond limits."""
    batches = _open(model, data, preset, limit, batch_size)
    report = verify_quantized(model, quantized, batches)
    typer.echo(str(report))
    if json_file is not None:
        _write_json(json_file, report.to_dict())
    failures = Thresholds(max_differing=max_differing, min_sqnr=min_sqnr).failures(report)
    for failure in failures:
        typer.echo(failure, err=True)
    if failures:
        raise typer.Exit(BEYOND_THRESHOLD)


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show operators, opset, size, inputs and outputs of MODEL, and what would be quantized."""
    facts = inspect_model(model)
    typer.echo(json.dumps(facts, indent=2) if as_json else inspection_text(facts))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path(
        "qwrap-demo"
    ),
) -> None:
    """Quantize a small digit classifier and show float against int8."""
    from qwrap.demo.run import run_demo

    run_demo(output, Console())


def main() -> None:
    """Run the shell."""
    app(prog_name="qwrap")


def _open(
    model: Path, data: str, preset: str | None, limit: int | None, batch_size: int | None
) -> Batches:
    return open_data(
        data,
        graph_inputs(model),
        preprocessing=None if preset is None else read_preprocessing(preset),
        limit=limit,
        batch_size=batch_size,
    )


def _write_json(path: Path, content: object) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from error
