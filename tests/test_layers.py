"""Imports go one way, torch stays in its corner, and `hiermem --help` loads nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "mlx_hiermem"

# Each part may import the parts before it. A part is a module or a folder of the package.
ORDER = [
    "cpu",
    "errors",
    "progress",
    "printable",
    "files",
    "safetensors_file",
    "config",
    "memory_choice",
    "sentences",
    "assets",
    "locks",
    "tree",
    "bank",
    "embedder",
    "cache",
    "router",
    "source_search",
    "memory",
]
ORDER += [
    "openlm",
    "template_bounds",
    "tokenizer",
    "anchor",
    "partial",
    "share",
    "tiers",
    "plan",
    "selection",
    "grammar",
    "sampling",
    "response",
    "batch",
    "prompt",
    "model",
    "model_folder",
    "session",
    "learn",
    "evaluate",
]
ORDER += ["convert", "apps"]
# Writing needs no cache; `verify` reads through it, to check what a model would be given.
CONVERT_MAY_IMPORT = {
    "locks",
    "progress",
    "errors",
    "files",
    "safetensors_file",
    "config",
    "assets",
    "tree",
    "bank",
    "cache",
    "memory",
    "openlm",
    "template_bounds",
    "tokenizer",
    "anchor",
    "convert",
}
# An export for phones brings the retriever and a part of a bank, and says what fits a device.
EXPORT_MAY_IMPORT = CONVERT_MAY_IMPORT | {"embedder", "router", "share", "plan"}
# The PyTorch definition and its comparison.
TORCH_MODULES = {f"{PACKAGE}.convert.{name}" for name in ("reference", "reference_memory", "parity")}
# Core AI takes its models from PyTorch; apps load the exporter inside functions.
TORCH_MODULES |= {f"{PACKAGE}.convert.coreai.{name}" for name in ("anchor", "asset", "compress", "export")}
# What builds Core ML programs, and so names coremltools' builder on every line; apps load it inside functions.
COREML_BUILDER = f"{PACKAGE}.convert.coreml.mil"
HEAVY = ("mlx", "mlx_lm", "transformers", "torch", "numpy", "huggingface_hub", "tokenizers", "safetensors", "gguf")


@dataclass(frozen=True)
class Import:
    """One imported module, and whether that happens when the importing module is loaded."""

    importer: str
    module: str
    at_load: bool

    @property
    def parts(self) -> tuple[str, str]:
        """The importer's and the imported module's part of the package ("" is the package itself)."""
        return part_of(self.importer), part_of(self.module)


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def source_files() -> dict[str, pathlib.Path]:
    """Module name -> file, of all three folders."""
    files = {}
    folders = ((ROOT / "src" / PACKAGE, PACKAGE), *((ROOT / n, f"{PACKAGE}.{n}") for n in ("convert", "apps")))
    for folder, name in folders:
        for file in folder.rglob("*.py"):
            module = ".".join((name, *file.relative_to(folder).with_suffix("").parts))
            files[module.removesuffix(".__init__")] = file
    return files


FILES = source_files()


def imports_of(module: str) -> Iterator[Import]:
    """Every import statement in a module, except those for type checkers alone."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
                names = [f"{source}.{alias.name}" for alias in child.names]
                yield from (Import(module, name if name in FILES else source, at_load) for name in names)
            else:
                in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_load and not in_function)

    return visit(ast.parse(FILES[module].read_text(encoding="utf-8")), True)


IMPORTS = [found for module in FILES for found in imports_of(module)]
OWN = [found for found in IMPORTS if found.module.split(".")[0] == PACKAGE]


def loaders_of(module: str) -> set[str]:
    """The module, and all that load it when they are loaded."""
    found = {module}
    while more := {each.importer for each in OWN if each.at_load and each.module in found} - found:
        found |= more
    return found


def test_the_files_are_found() -> None:
    for module in ("mlx_hiermem", "mlx_hiermem.bank.bank", "mlx_hiermem.convert.reference"):
        assert module in FILES
    assert "mlx_hiermem.apps.cli.main" in FILES
    assert {part_of(module) for module in FILES} - {""} <= set(ORDER), "a new part needs a place in ORDER"
    assert len(OWN) > 50


def test_the_map_of_the_house_names_every_part() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where a thing is")[1].split("\n## ")[0]
    named = {name.removeprefix("src/mlx_hiermem/").strip("/") for name in re.findall(r"`([\w/]+)`", table)}
    assert set(ORDER) - named == set(), "CONTRIBUTING.md says where a thing is; these parts are missing there"


def test_imports_go_one_way() -> None:
    wrong = []
    for found in OWN:
        importer, imported = found.parts
        if importer and imported and ORDER.index(importer) < ORDER.index(imported):
            wrong.append(f"{found.importer} imports {found.module}")
        exports = re.search(r"\.convert\.(export|coreml|coreai)\.", found.importer)
        allowed = EXPORT_MAY_IMPORT if exports else CONVERT_MAY_IMPORT
        if importer == "convert" and imported and imported not in allowed:
            wrong.append(f"{found.importer} imports {found.module}")
    assert wrong == []


def test_no_modules_import_one_another() -> None:
    """Not even inside functions: of a circle no part can be read, tested or moved alone."""
    imports = {module: {each.module for each in OWN if each.importer == module} - {module} for module in FILES}
    left = set(FILES)
    while free := {module for module in left if not imports[module] & left}:
        left -= free
    assert left == set(), "these import one another, or one that does"


def test_nothing_loads_convert_until_it_converts() -> None:
    outside = [found for found in OWN if found.parts[0] != "convert" and found.parts[1] == "convert"]
    assert [found for found in outside if found.at_load or found.parts[0] != "apps"] == []


def test_torch_stays_in_its_corner() -> None:
    wrong = []
    for found in IMPORTS:
        library = found.module.split(".")[0]
        runtime = found.parts[0] not in ("convert", "apps")
        if library in ("torch", "coremltools") and (runtime or found.at_load):
            wrong.append((found.importer, library))
        if library == "transformers" and found.at_load:
            wrong.append((found.importer, library))
    assert {importer for importer, library in wrong if library != "coremltools"} <= TORCH_MODULES, wrong
    assert {importer for importer, library in wrong if library == "coremltools"} <= {COREML_BUILDER}, wrong


@pytest.mark.slow
def test_everything_else_loads_without_torch() -> None:
    modules = sorted(set(FILES) - TORCH_MODULES - loaders_of(COREML_BUILDER))
    script = f"""
import importlib, sys
sys.modules["torch"] = sys.modules["coremltools"] = None  # as if not installed
for module in {modules}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import sys
sys.argv = ["hiermem", *{arguments}]
from mlx_hiermem.apps.cli.main import main
try:
    main()
except SystemExit:
    pass
print("LOADED", sorted(set({HEAVY}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "hiermem" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout + done.stderr
