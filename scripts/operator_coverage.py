"""Count the operators that qwrap computes, out of all that onnx and onnxruntime declare.

python scripts/operator_coverage.py           # one row a domain
python scripts/operator_coverage.py --list    # and what is not as usual, by name
python scripts/operator_coverage.py --suite   # and run the cases of onnx's backend suite
python scripts/operator_coverage.py --suite --update-readme
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from backend_suite import Verdicts, run_suite
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from readme_section import update_section

from qwrap.model.missing import BUILT_IN
from qwrap.model.values import FLOW
from qwrap.ops.registry import operators

README = Path(__file__).resolve().parents[1] / "README.md"
WAYS = {
    "torch": "torch function",
    "flow": "control flow",
    "generated": "in generated code",
    "body": "function body",
    "onnxruntime": "onnxruntime",
    "refused": "refused",
}
"""How a node with an operator is computed -> heading of the column."""
CONTRIB = "com.microsoft"  # the one domain that onnxruntime declares and onnx does not


@dataclass(frozen=True, slots=True, order=True)
class Revision:
    """One revision of an operator, and how qwrap computes it, a key of ``WAYS``."""

    domain: str
    op_type: str
    since: int
    way: str

    @property
    def operator(self) -> tuple[str, str]:
        """Domain and type."""
        return self.domain, self.op_type


def revisions() -> list[Revision]:
    """Return every revision of every operator that the installed onnx and onnxruntime declare."""
    computed, kernels = set(operators()), list(runtime.get_all_opkernel_def())
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for kernel in kernels:
        ranges[kernel.domain, kernel.op_name].append(kernel.version_range)
    found = []
    for schema in _schemas():
        domain, name, since = schema.domain, schema.name, int(schema.since_version)
        has_kernel = any(first <= since <= last for first, last in ranges[domain, name])
        found.append(Revision(domain, name, since, _way(schema, computed, has_kernel)))
    return sorted(found)


def _schemas() -> Iterator[Any]:
    yield from onnx.defs.get_all_schemas_with_history()
    yield from (s for s in runtime.get_all_operator_schema() if s.domain == CONTRIB)


def _way(schema: Any, computed: set[tuple[str, str, int]], has_kernel: bool) -> str:
    if not schema.domain and schema.name in FLOW:
        return "flow"
    if (schema.domain, schema.name, schema.since_version) in computed:
        return "torch"
    if not schema.domain and schema.name in BUILT_IN:
        return "generated"
    if isinstance(schema, onnx.defs.OpSchema) and (
        schema.has_function or schema.has_context_dependent_function
    ):
        return "body"
    return "onnxruntime" if has_kernel and _is_of_tensors(schema) else "refused"


def _is_of_tensors(schema: Any) -> bool:
    """Whether qwrap can hand it over: no graphs inside, no maps or sparse tensors at its ends."""
    types = [value.types for value in (*schema.inputs, *schema.outputs)]
    kinds = [str(attribute.type) for attribute in schema.attributes.values()]
    return not any("GRAPH" in kind for kind in kinds) and all(
        any("map(" not in one and "sparse" not in one for one in allowed) for allowed in types
    )


# --- what is printed -----------------------------------------------------------------------------


def table(found: list[Revision]) -> str:
    """One row a domain: operators by the way their newest revision is computed, and revisions."""
    ways = [way for way in WAYS if any(revision.way == way for revision in found)]
    header = ("domain", "operators", "revisions", *(WAYS[way] for way in ways))
    rows = [header, ("---",) * len(header)]
    for domain in sorted({revision.domain for revision in found}):
        own = [revision for revision in found if revision.domain == domain]
        newest = {revision.operator: revision.way for revision in own}  # ascending: the last stays
        counts = Counter(newest.values())
        computed = sum(revision.way != "refused" for revision in own)
        total = f"{computed} of {len(own)}"
        rows.append((domain or "ai.onnx", str(len(newest)), total, *(str(counts[w]) for w in ways)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def names(found: list[Revision]) -> Iterator[str]:
    """Yield a line for each way but torch functions, with the operators it is used for."""
    for way in WAYS:
        by_domain: dict[str, dict[str, None]] = defaultdict(dict)
        for revision in found:
            if revision.way == way != "torch":
                by_domain[revision.domain or "ai.onnx"][revision.op_type] = None
        for domain, listed in by_domain.items():
            yield f"{WAYS[way]}, {domain}: {', '.join(listed)}"


def bodies_line() -> str:
    """Say how many operators have a function body in their schema, and a function of torch."""
    with_body = {
        (schema.domain, schema.name)
        for schema in onnx.defs.get_all_schemas()
        if schema.has_function or schema.has_context_dependent_function
    }
    own = len(with_body & {(domain, op_type) for domain, op_type, _ in operators()})
    return (
        f"{len(with_body)} operators have a function body in their schema, {own} of them a torch "
        "function too."
    )


def suite_line(verdicts: Verdicts) -> str:
    """Say how many cases pass, and what becomes of the others."""
    return (
        f"{len(verdicts.passed)} of {verdicts.count} cases of onnx's backend suite pass; "
        f"{len(verdicts.refused)} are refused, {len(verdicts.differing)} "
        "give other values."
    )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--list",
        action="store_true",
        help="also name operators without a torch function, and cases that do not pass",
    )
    parser.add_argument("--suite", action="store_true", help="run onnx's backend suite too")
    parser.add_argument("--update-readme", action="store_true", help="write the table there")
    options = parser.parse_args()
    if options.update_readme and not options.suite:
        parser.error("--update-readme writes the result of --suite as well")
    found = revisions()
    text = (
        f"onnx {onnx.__version__} (opset {onnx.defs.onnx_opset_version()}), "
        f"onnxruntime {onnxruntime.__version__}:\n\n{table(found)}"
    )
    text += f"\n\n{bodies_line()}"
    verdicts = run_suite() if options.suite else None
    if verdicts is not None:
        text += f"\n{suite_line(verdicts)}"
    print(text)
    if options.list:
        print("", *names(found), sep="\n")
    if options.list and verdicts is not None:
        print(f"refused: {', '.join(sorted(verdicts.refused))}")
        print(f"other values: {', '.join(sorted(verdicts.differing))}")
    if options.update_readme:
        update_section(README, "coverage", text)


if __name__ == "__main__":
    main()
