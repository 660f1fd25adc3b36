"""The house rules that can be read from the source: who imports whom, and one test file per module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "evatok"
LAYERS = (
    {"errors"},
    {"config"},
    {"artifacts"},
    {"weights", "video", "report"},
    {"models", "metrics"},
    {"losses", "assignment"},
    {"training"},
    {"distributed"},
    {"stages"},
    {"experiment"},
    {"sweep"},
    {"benchmarks"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    """The top-level module or package of evatok that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports anywhere, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(path: Path) -> Iterator[str]:
    """The modules that importing the file imports: not those inside functions or for type checkers."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_and_ray_stays_in_distributed(path: Path):
    own = part(path)
    assert own in LEVEL, f"{own} is in no layer"
    for name in imports(path):
        words = name.split(".")
        if words[0] == "ray":
            assert own == "distributed", "only evatok/distributed imports ray"
        if words[0] == "evatok" and len(words) > 1 and words[1] in LEVEL:
            assert words[1] == own or LEVEL[words[1]] < LEVEL[own], f"{own} must not import {name}"


@pytest.mark.parametrize("name", ["__init__", "__main__", "console", "parser"])
def test_command_line_starts_without_anything_heavy(name: str):
    found = set(at_import(PACKAGE / "cli" / f"{name}.py"))
    ours = {module for module in found if module.startswith("evatok")}
    assert ours <= {"evatok", "evatok.cli", "evatok.cli.console", "evatok.cli.parser", "evatok.errors"}
    assert not {module.split(".")[0] for module in found} & {"torch", "ray", "rich", "pyarrow"}


@pytest.mark.parametrize("module", ["stages.tokenizer", "stages.generate", "cli.codec"])
def test_models_are_imported_without_the_compiler_which_takes_as_long_as_torch(module: str):
    code = f"import sys, evatok.{module}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_stay_small():
    long = {str(p.relative_to(PACKAGE)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 520}
    assert not long


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "helpers", "misc", "manager", "common", "base"}
    assert not [path for path in SOURCES if path.stem in empty]


def test_tests_mirror_the_package():
    tests = Path(__file__).parent
    apart = {"cluster", "faults", "benchmarks"}
    apart |= {f"test_{name}.py" for name in ("imports", "readme", "makefile", "shipped_experiments")}
    for path in tests.rglob("test_*.py"):
        inside = path.relative_to(tests)
        if inside.parts[0] in apart:
            continue
        if len(inside.parts) > 1:
            assert (PACKAGE / inside.parent).is_dir(), f"tests/{inside.parent} mirrors no package"
        else:
            module = PACKAGE / inside.stem.removeprefix("test_")
            assert module.is_dir() or module.with_suffix(".py").exists(), f"tests/{inside} tests no module"
