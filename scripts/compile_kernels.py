#!/usr/bin/env python
"""Compile every Triton kernel of hf_nvfp4.ops for the given architectures: no GPU needed, none used.

One line for each kernel and architecture: registers, spills, shared memory, and the matrix and FP4 conversion
instructions in its PTX. Exit status 1 if one does not compile, takes the compiler down, or lacks an instruction
that its `Variant` expects.

    python scripts/compile_kernels.py --arch 80 89 90 100 120
    python scripts/compile_kernels.py --arch 100 --kernel 'fp4_matmul*'
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch

ARCHITECTURES = (80, 89, 90, 100, 120)
INSTRUCTION = re.compile(r"\b(?:(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]+|cvt\.[\w.]*e2m1[\w.]*)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="N", help="90 for sm_90, …")
    parser.add_argument("--kernel", nargs="+", default=["*"], metavar="NAME", help="only these (* and ? match)")
    parser.add_argument("--package", default="hf_nvfp4.ops", help="where to look for VARIANTS (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def find_variants(package: str, patterns: list[str]) -> dict:
    """name -> Variant, of all modules of a package that have a list VARIANTS."""
    variants = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        for variant in getattr(importlib.import_module(f"{package}.{info.name}"), "VARIANTS", ()):
            if variant.name in variants:
                raise ValueError(f"two kernel variants are named {variant.name!r}; names are unique")
            variants[variant.name] = variant
    chosen = {name: v for name, v in variants.items() if any(fnmatch(name, p) for p in patterns)}
    if not chosen:
        raise ValueError(f"no kernel of {package} is named {' or '.join(patterns)}; known: {', '.join(variants)}")
    return chosen


# ---------------------------------------------------------------------------- the worker: may crash

def source_of(variant):
    """Triton's description of what a launch of this variant compiles."""
    from triton.compiler import ASTSource

    parameters = {p.name: p for p in variant.kernel.params}
    for name in (*variant.types, *variant.constexprs, *variant.divisible):
        if name not in parameters:
            raise ValueError(f"the kernel has no argument {name!r}; it has {', '.join(parameters)}")
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(parameters.items()):
        if name in variant.types:
            signature[name] = variant.types[name]
            if name in variant.divisible or signature[name].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in variant.constexprs or parameter.has_default:
            signature[name] = "constexpr"
            constants[name] = variant.constexprs.get(name, parameter.default)
        else:
            raise ValueError(f"argument {name!r} is in neither types nor constexprs and has no default")
    return ASTSource(variant.kernel, signature, constants, attributes)


def compile_variant(variant, arch: int) -> dict:
    """Compile; what came of it: registers, spilled bytes, shared bytes, instruction -> count."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source_of(variant), GPUTarget("cuda", arch, 32), dict(variant.options))
    ptx = kernel.asm["ptx"]
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    expected = variant.expect.get(arch)
    if expected and not re.search(expected, ptx):
        raise ValueError(f"its PTX has no instruction that matches {expected!r}")
    return {
        "registers": registers and int(registers[1]),
        "spilled": spilled and int(spilled[1]) + int(spilled[2]),
        "shared": kernel.metadata.shared,
        "instructions": Counter(INSTRUCTION.findall(ptx)),
    }


def worker(package: str, arch: int) -> None:
    """Compile the variants named on stdin, one a line; a line of JSON for each on stdout."""
    names = sys.stdin.read().split("\n")
    variants = find_variants(package, names)
    for name in names:
        try:
            result = compile_variant(variants[name], arch)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **result}), flush=True)


# ---------------------------------------------------------------------------- the parent: may not

def compile_all(package: str, arch: int, names: list[str]) -> Iterator[tuple[str, dict]]:
    """(name, result) of each; a worker that dies takes only the variant with it that it was at."""
    while names:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--worker", "--package", package, "--arch", str(arch)]
            # An empty cache: a cached kernel has no log of its registers. Fusion as the launch says, or Triton.
            run = subprocess.run(
                command,
                input="\n".join(names),
                capture_output=True,
                text=True,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
            )
        done = 0
        for line in run.stdout.splitlines():
            if line.startswith('{"name"'):
                result = json.loads(line)
                yield result.pop("name"), result
                done += 1
        if done < len(names):
            yield names[done], {"crashed": _last_words(run)}
            done += 1
        names = names[done:]


def _last_words(run: subprocess.CompletedProcess) -> str:
    how = f"signal {-run.returncode}" if run.returncode < 0 else f"exit status {run.returncode}"
    lines = [line for line in run.stderr.splitlines() if re.search("assert|error|fatal", line, re.IGNORECASE)]
    return f"the compiler died ({how}){': ' + lines[0].strip() if lines else ''}"


def describe(result: dict) -> str:
    """One line of a result."""
    for bad in ("failed", "crashed"):
        if bad in result:
            return f"{bad}: {' '.join(result[bad].split())[:300]}"
    registers = "registers unknown" if result["registers"] is None else f"{result['registers']} registers"
    spilled = "spills unknown" if result["spilled"] is None else f"{result['spilled']} bytes spilled"
    found = [f"{name} ×{count}" for name, count in sorted(result["instructions"].items())]
    return ", ".join([registers, spilled, f"{result['shared']} bytes shared", *found])


def say(line: str) -> None:
    """Print a line whole, whatever other threads print."""
    print(f"{line}\n", end="", flush=True)


def compile_for(package: str, variants: dict, arch: int, triton_version: tuple[int, int]) -> list[str]:
    """All variants for one architecture, printed; the names of those that did not compile."""
    fits, bad = [], []
    for name, variant in variants.items():
        if reason := variant.unfit(arch, triton_version):
            say(f"{name} sm_{arch}: skipped: {reason}")
        else:
            fits.append(name)
    for name, result in compile_all(package, arch, fits):
        say(f"{name} sm_{arch}: {describe(result)}")
        if "failed" in result or "crashed" in result:
            bad.append(f"{name} sm_{arch}")
    return bad


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled. Unset it and run again.")
        return 1
    try:
        import triton
    except ImportError:
        print("Triton is not installed here, so there is nothing to compile with: pip install triton")
        return 1
    if arguments.worker:
        worker(arguments.package, arguments.arch[0])
        return 0
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    print(f"device none (compiled ahead of time), backend Triton {triton.__version__}, kernels of {arguments.package}")
    try:
        variants = find_variants(arguments.package, arguments.kernel)
    except ValueError as error:
        print(error)
        return 1
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        bad = sum(pool.map(lambda a: compile_for(arguments.package, variants, a, version), arguments.arch), [])
    print(f"{len(bad)} did not compile: {', '.join(bad)}" if bad else "all compiled")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
