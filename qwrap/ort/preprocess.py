"""``python -m qwrap.ort.preprocess``: quant_pre_process from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qwrap.ort.shape_inference import quant_pre_process

_DESCRIPTION = """\
Prepare a float model for quantization, in three steps that can be skipped:
symbolic shape inference (best for transformers), optimization by onnxruntime, ONNX shape inference.
"""


def truth(text: str) -> bool:
    """Return what ``text`` says.

    Raises:
        argparse.ArgumentTypeError: it is neither yes nor no.
    """
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false") from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m qwrap.ort.preprocess", description=_DESCRIPTION
    )
    parser.add_argument("--input", required=True, help="model to read")
    parser.add_argument("--output", required=True, help="model to write")
    flags = {
        "skip_optimization": "leave out onnxruntime's optimizations",
        "skip_onnx_shape": "leave out ONNX shape inference",
        "skip_symbolic_shape": "leave out symbolic shape inference, which needs sympy",
        "auto_merge": "take two symbolic dimensions for one where they contradict each other",
        "guess_output_rank": "give an unknown operator the rank of its first input",
        "save_as_external_data": "write weights to files beside the output",
        "all_tensors_to_one_file": "all of them to one file",
    }
    for name, text in flags.items():
        parser.add_argument(
            f"--{name}", nargs="?", const=True, default=False, type=truth, help=text
        )
    parser.add_argument("--int_max", type=int, default=2**31 - 1, help="larger is unbounded")
    parser.add_argument("--verbose", type=int, default=0, help="0: nothing, 1: warnings, 3: all")
    parser.add_argument("--external_data_location", help="name of the file with weights")
    parser.add_argument(
        "--external_data_size_threshold", type=int, default=1024, help="bytes of a tensor"
    )
    return parser


def parse_arguments() -> argparse.Namespace:
    """Return what the command was given."""
    return make_parser().parse_args()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: an argument makes no sense, or all steps are skipped.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    if given["skip_optimization"] and given["skip_onnx_shape"] and given["skip_symbolic_shape"]:
        parser.error("all three steps are skipped: nothing to be done")
    source, target = given.pop("input"), given.pop("output")
    quant_pre_process(source, target, **given)


if __name__ == "__main__":
    main()
