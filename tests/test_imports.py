"""The imports of the package point one way (see the package's layers in the README)."""

import ast
from pathlib import Path

import pytest

import qwrap

PACKAGE = Path(__file__).resolve().parents[1] / "qwrap"
BASE = {
    "errors",
    "minifloat",
    "codebook",
    "dtypes",
    "overrides",
    "targets",
    "config",
    "rounding",
    "numerics",
    "compensation",
    "fused",
    "learned",
}
MAY_IMPORT = {
    "errors": set(),
    "minifloat": set(),
    "codebook": set(),
    "dtypes": {"errors", "minifloat", "codebook"},
    "overrides": {"errors", "dtypes"},
    "targets": {"errors"},
    "config": {"errors", "dtypes", "overrides", "targets"},
    "rounding": {"minifloat", "codebook", "dtypes"},
    "numerics": BASE - {"numerics", "compensation", "fused", "learned"},
    "compensation": set(),
    "fused": {"errors"},
    "learned": {"config", "fused", "rounding"},
    "graph": BASE,
    "ops": BASE,
    "model": {*BASE, "graph", "ops"},
    "quant": {*BASE, "graph", "ops", "model"},
    "reconstruct": {*BASE, "graph", "ops", "model", "quant"},
    "algorithms": {*BASE, "graph", "ops", "model", "quant", "reconstruct"},
    "train": {*BASE, "graph", "ops", "model", "quant", "algorithms", "export"},
    "export": {*BASE, "graph", "ops", "model", "quant"},
    "importing": {*BASE, "graph", "ops", "model", "quant", "export"},
    "load": {*BASE, "graph", "model", "importing"},
    "verify": {*BASE, "graph", "ops", "model"},
    "data": BASE,
    "quantize": {*BASE, "graph", "model", "quant", "algorithms", "export", "train", "improve"},
    "improve": {*BASE, "graph", "model", "quant", "reconstruct", "algorithms", "train", "mixed"},
    "mixed": {*BASE, "", "graph", "ops", "model", "quant", "export", "train", "verify"},
    "nbits": {*BASE, "graph", "ops", "model", "quant"},
    "kv_cache": {*BASE, "graph", "ops", "model", "quant"},
    "ort": {"", *BASE, "graph", "data", "nbits"},
    "backend": {"", "errors", "graph", "model"},
    "cli": {"", *BASE, "graph", "ops", "quant", "improve", "data", "demo"},
    "demo": {"", *BASE},
    "__main__": {"cli"},
}


def layer_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qwrap":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                n.partition(".")[2].partition(".")[0] for n in names if n.split(".")[0] == "qwrap"
            }
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_layers_before_it(layer: str) -> None:
    folder, file = PACKAGE / layer, PACKAGE / f"{layer}.py"
    files = list(folder.rglob("*.py")) if folder.is_dir() else [file] if file.exists() else []
    allowed = MAY_IMPORT[layer] | {layer}
    for path in files:
        found = layer_imports(path)
        if "" in allowed:  # on the public names too
            found -= set(qwrap.__all__) | {""}
        assert found <= allowed, path


def test_every_layer_is_listed() -> None:
    names = {
        p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix in ("", ".py")
    }
    assert names - {"__init__", "__pycache__"} <= set(MAY_IMPORT)


def test_graph_has_no_torch_and_ops_no_onnx_ir() -> None:
    for layer, banned in (("graph", "torch"), ("ops", "onnx_ir")):
        for path in (PACKAGE / layer).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            assert not [m for m in modules if m.split(".")[0] == banned], path
