"""``qwrap search``: from a budget to a file with the best types for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import qwrap
from qwrap.cli.app import (
    DATA_HELP,
    BatchSize,
    Exclude,
    Finetune,
    Limit,
    Model,
    Preset,
    Quiet,
    Regions,
    Scope,
    app,
    open_batches,
    show,
    size_text,
)
from qwrap.cli.settings import config_of
from qwrap.data import FUNCTION, find_function
from qwrap.errors import ConfigError, ExportError
from qwrap.export.exporter import same_file
from qwrap.graph.save import check_target

NO_METRIC = "none"

Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="COST=MOST",
        help='The most that the file may cost, as in "bytes=300 KB", "bytes=50%" of the float '
        'model, "latency=1.1 x uint8/int8", or several with commas; costs are bytes, bit_ops '
        "and latency.",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        min=0,
        help="The most that the metric may fall by, or else the loss be; the cheapest is taken.",
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        "--metric",
        metavar="none|MODULE:FUNCTION",
        help="Function that takes a model (a torch module) and returns a number, more is better; "
        "'none' goes by how far outputs are from the float model's.",
    ),
]
Choices = Annotated[
    list[str] | None,
    typer.Option(
        "--choice",
        metavar="TYPES",
        help="Types to choose from, of activations and weights, as in uint8/int8 or float32; "
        "repeatable. Default: uint8/int8, uint16/int8 and float32.",
    ),
]


@app.command()
def search(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the QDQ file.")],
    calibration: Annotated[str, typer.Option("--calibration", metavar="DATA", help=DATA_HELP)],
    budget: Budget = None,
    max_drop: MaxDrop = None,
    metric: Metric = NO_METRIC,
    choices: Choices = None,
    by: Annotated[
        str, typer.Option("--by", help="What has types of its own: layer, node or block.")
    ] = "layer",
    along: Annotated[
        str | None, typer.Option("--along", help="Cost that the front runs along.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option("--sensitivity", help="Losses of layers: measured, or fisher (faster).")
    ] = "measured",
    points: Annotated[
        int | None, typer.Option("--points", min=2, help="Points to lay along the front.")
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads in which latency is measured.")
    ] = 0,
    scope: Scope = None,
    exclude: Exclude = None,
    regions: Regions = None,
    preset: Preset = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    finetune: Finetune = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FILE", help="Keep what was measured here, and go on."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the front, as .png or .svg.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all points as JSON.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Find the types of all layers with which MODEL is best within a budget, and write the file."""
    if same_file(model, output):
        raise ExportError(f"{output}: is the float model itself; write to another file")
    for path in (output, plot, json_file):
        if path is not None:
            check_target(path)
    given: dict[str, Any] = {} if points is None else {"points": points}
    if choices:
        given["choices"] = choices
    result = qwrap.search(
        model,
        open_batches(model, calibration, preset, limit, batch_size),
        budget=budget,
        max_drop=max_drop,
        metric=_metric(metric),
        by=by,  # type: ignore[arg-type]  # refused there
        along=along,  # type: ignore[arg-type]
        method=sensitivity,  # type: ignore[arg-type]
        threads=threads,
        config=config_of(regions, scope=scope, excluded=exclude),
        finetune=finetune,
        resume=resume,
        progress=not quiet,
        **given,
    )
    assert result.model is not None
    qwrap.export(result.model, output)
    if plot is not None:
        result.plot(plot)
    if json_file is not None:
        result.save(json_file)
    console = Console(quiet=quiet, highlight=False)
    show(console, str(result))
    show(console, f"{output}: {size_text(model, output)}")


def _metric(text: str) -> Callable[[qwrap.WrappedModel], float] | None:
    if text == NO_METRIC:
        return None
    if not FUNCTION.fullmatch(text):
        raise ConfigError(f"--metric {text}: expected 'none' or MODULE:FUNCTION")
    found: Callable[..., Any] = find_function(text)
    return found
