"""The package's shape: what may import what, and that importing it is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_nvfp4"

# module -> the modules of this package that it may import (DESIGN.md's layout).
ALLOWED = {
    "formats": set(),
    "casts": {"formats"},
    "language": {"casts"},
    "recipes": {"casts", "language"},
    "rounding": {"formats"},
    "eden": {"casts", "formats", "rounding"},
    "reference": {"casts", "eden", "formats", "rounding"},
    "backends": {"casts", "formats", "language", "reference", "rounding", "backends", "ops"},
    "gemm": {"backends", "casts", "language", "rounding"},
    "sharing": {"casts"},
    "conditioning": {"casts", "language", "reference", "rounding"},
    "tensor_parallel": {"casts", "language"},
    "precast": {"casts", "reference"},
    "linear": {"casts", "conditioning", "gemm", "language", "precast", "recipes", "sharing", "tensor_parallel"},
    "conv1d": {"linear"},
    "grouped": {"backends", "linear"},
    "experts": {"backends", "gemm", "grouped", "language", "linear"},
    "weight_reads": set(),
    "convert": {"backends", "conv1d", "experts", "gemm", "language", "linear", "weight_reads"},
    "schedule": {"casts", "convert", "language", "linear"},
    "gathering": {"backends", "casts", "convert", "language", "linear", "precast", "tensor_parallel"},
    "distillation": set(),
    "losses": {"linear"},
    "oscillation": {"language", "linear", "reference"},
    "integration": {"casts", "convert", "data", "importing", "language", "layouts", "linear", "packed", "recipes"},
    "layouts": {"casts", "data", "formats", "reference"},
    "shards": {"data"},
    "importing": {"data", "layouts", "linear", "packed", "reference", "shards", "weights"},
    "weights": {"data", "language", "layouts", "reference"},
    "packed": {"backends", "experts", "gemm", "language", "linear", "ops", "recipes", "reference", "scores", "weights"},
    "sources": {"convert", "data", "integration", "language", "layouts", "linear", "packed", "shards", "weights"},
    "exporting": {"casts", "data", "integration", "language", "layouts", "shards", "sources", "weights"},
    "data": set(),
    "sizes": set(),
    "packing": {"data"},
    "options": {"data", "sizes"},
    "runlog": {"data"},
    "tasks": {"data"},
    "scores": set(),
    "evaluation": {"gemm", "integration", "language", "linear", "packed", "scores"},
    "timing": set(),
    "yardstick": {"backends", "casts", "reference", "rounding"},
    "benchmarks": {"backends", "casts", "gemm", "language", "linear", "ops", "recipes", "yardstick"},
    "bench_model": {"benchmarks", "convert", "integration", "sizes", "timing"},
    "bench_tables": {"scores"},
    "bench_rows": {"backends", "bench_model", "bench_tables", "benchmarks", "gemm", "timing"},
    "bench_decode": {
        "bench_inference", "bench_model", "bench_rows", "bench_tables", "benchmarks", "integration", "packed", "timing",
    },
    "bench_experts": {"bench_rows", "bench_tables", "benchmarks", "experts", "language"},
    "bench_inference": {"bench_rows", "bench_tables", "benchmarks", "casts", "ops", "reference", "timing"},
    "quantizer_study": {"casts", "language", "reference", "rounding"},
    "captured": {"linear"},
    "model_study": {"captured", "data", "integration", "language", "linear", "packing"},
    "operand_stats": {"captured", "casts", "conditioning", "gemm", "linear", "quantizer_study", "reference"},
    "stats": {"captured", "linear", "operand_stats", "scores"},
    "quantizer_tables": {"scores"},
    "report": {"scores"},
    "gaps": {"report", "scores"},
    "plots": {"gaps", "report"},
    "cards": {"report", "scores"},
    "planning": {"casts", "convert", "formats", "language"},
    "processes": set(),
    "tiny_configs": set(),
    "architectures": {"casts", "convert", "experts", "integration", "language", "linear", "tiny_configs"},
    "architecture_tables": {"architectures", "experts", "scores", "tiny_configs"},
    "comparison": {"data", "gemm", "integration", "options", "processes", "report", "runlog", "scores"},
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_nvfp4."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "hf_nvfp4":
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_nvfp4.")}
    return names


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_module_imports_only_what_stands_below_it(module):
    path = PACKAGE / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        assert _imports(file) <= ALLOWED[module], file


def test_every_module_has_its_place():
    modules = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if not p.name.startswith("_")}
    assert modules == set(ALLOWED)


def test_reports_need_no_torch():
    modules = "hf_nvfp4.cards, hf_nvfp4.plots, hf_nvfp4.quantizer_tables"
    assert _python(f"import sys, {modules}; print('torch' in sys.modules)") == "False"


def test_only_the_integration_subclasses_transformers_quantizers():
    users = {p.name for p in PACKAGE.rglob("*.py") if "HfQuantizer" in p.read_text()}
    assert users == {"integration.py"}


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light_and_names_are_found():
    loaded = "print([m for m in ('transformers', 'datasets', 'lm_eval', 'triton') if m in sys.modules])"
    assert _python(f"import sys, hf_nvfp4; {loaded}") == "[]"
    assert _python("import hf_nvfp4; print(all(hasattr(hf_nvfp4, n) for n in hf_nvfp4.__all__))") == "True"


def test_an_unknown_name_says_what_there_is():
    import hf_nvfp4

    with pytest.raises(AttributeError, match="NVFP4TrainingConfig"):
        _ = hf_nvfp4.NVFP4Config
