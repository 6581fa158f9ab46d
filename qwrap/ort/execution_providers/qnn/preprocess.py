"""qnn_preprocess_model; ``python -m qwrap.ort.execution_providers.qnn.preprocess`` runs it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qwrap.ort.execution_providers.qnn.channel_last import (
    InputOutputNameMap,
    update_io_to_channel_last,
)
from qwrap.ort.execution_providers.qnn.preparation import (
    qnn_preprocess_model,
    save_and_reload_optimize_model,
)

__all__ = [
    "InputOutputNameMap",
    "main",
    "qnn_preprocess_model",
    "save_and_reload_optimize_model",
    "update_io_to_channel_last",
]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        "python -m qwrap.ort.execution_providers.qnn.preprocess",
        description="Prepare a model for Qualcomm's provider.",
    )
    parser.add_argument("--input_model_path", "-i", required=True, help="model to read")
    parser.add_argument("--output_model_path", "-o", required=True, help="model to write")
    flags = {
        "save_as_external_data": "write weights to files beside the output",
        "all_tensors_to_one_file": "all of them to one file",
        "external_data_convert_attribute": "tensors in attributes too",
        "fuse_layernorm": "fuse LayerNormalization",
        "exclude_initializer_from_input": "take initializers out of the graph inputs",
    }
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--external_data_location", help="name of the file with weights")
    parser.add_argument(
        "--external_data_size_threshold", type=int, default=1024, help="bytes of a tensor"
    )
    for role in ("inputs", "outputs"):
        parser.add_argument(
            f"--{role}_to_make_channel_last", nargs="+", help=f"graph {role} to transpose"
        )
    parser.add_argument(
        "--dynamic_input_shapes",
        nargs=2,
        action="append",
        metavar=("NAME", "SHAPE"),
        help="fixed shape of an input, such as: x 1,3,224,224",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = vars(make_parser().parse_args(arguments))
    source, target = given.pop("input_model_path"), given.pop("output_model_path")
    qnn_preprocess_model(source, target, **given)


if __name__ == "__main__":
    main()
