"""The one command: `python -m tests.check` checks everything that needs no GPU, and says what each stage took.

Static stages all run, so that one go shows all that is wrong; the tests run only when they pass. Arguments go to
pytest: `python -m tests.check tests/unit -k ledger`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("protocol", "rollout_server", "learner")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
SLOWEST_SHOWN = 15

STATIC_STAGES: dict[str, list[str]] = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports"],
}


def main(pytest_arguments: list[str]) -> int:
    """Run all stages and return the exit code: that of the tests, or 1 when a static stage fails."""
    seconds: dict[str, float] = {}
    failed = [name for name, command in STATIC_STAGES.items() if run_stage(name, command, seconds) != 0]
    if problems := [*size_problems(ROOT), *volume_problems(ROOT)]:
        print("sizes:", *problems, sep="\n  ")
        failed.append("sizes")
    code = 1
    if not failed:
        command = ["pytest", "-m", "not gpu", f"--durations={SLOWEST_SHOWN}", *pytest_arguments]
        code = run_stage("tests", command, seconds)
    print("\n" + "  ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items()))
    if failed:
        print(f"failed: {', '.join(failed)}; the tests did not run")
    return code


def run_stage(name: str, command: list[str], seconds: dict[str, float]) -> int:
    """Run one tool from this interpreter's environment; record its seconds and return its exit code."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    tool, *arguments = command
    started = time.monotonic()
    done = subprocess.run([str(Path(sys.executable).parent / tool), *arguments], cwd=ROOT, check=False)
    seconds[name] = time.monotonic() - started
    return done.returncode


def size_problems(root: Path) -> Iterator[str]:
    """Yield a line for each product file or function that is too long to be read in one go."""
    for file in product_files(root):
        source = file.read_text("utf-8")
        lines = source.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{file.relative_to(root)}: {lines} lines, at most {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    where = f"{file.relative_to(root)}:{node.lineno}"
                    yield f"{where}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def volume_problems(root: Path) -> Iterator[str]:
    """Yield a line when there are fewer lines of tests than of product."""
    product = count_lines(product_files(root))
    tests = count_lines((root / "tests").rglob("*.py"))
    if tests < product:
        yield f"tests have {tests} lines for {product} lines of product: at least as many are wanted"


def product_files(root: Path) -> Iterator[Path]:
    """Yield every Python file of the product."""
    for package in PRODUCT:
        yield from sorted((root / package).rglob("*.py"))


def count_lines(files: Iterator[Path]) -> int:
    """Add up the lines of text files."""
    return sum(file.read_text("utf-8").count("\n") for file in files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
