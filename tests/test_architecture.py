"""House rules, checked over the syntax tree: imports run one way, the library prints nothing and fixes no device."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# From low to high. A module imports only from rows above its own, or from within its own entry. An entry covers the
# modules below it and those that go on with an underscore (ldm.checkpoint_file); the longest match counts.
FLOORS: list[set[str]] = [
    {"ldm"},
    {"ldm.util", "ldm.protocols", "ldm.cli"},
    {"ldm.resources"},
    {"ldm.lr_scheduler", "ldm.checkpoint", "ldm.data"},
    {"ldm.modules.diffusionmodules.convolution"},
    {"ldm.modules.diffusionmodules.util", "ldm.modules.ema", "ldm.modules.distributions"},
    {"ldm.modules.attention", "ldm.modules.x_transformer"},
    {"ldm.modules.diffusionmodules", "ldm.modules.losses"},
    {"ldm.modules.encoders", "ldm.modules.embedding_io"},
    {"ldm.modules.embedding_manager"},
    {"ldm.models.first_stage"},
    {"ldm.models.autoencoder"},
    {"ldm.models.diffusion.schedule", "ldm.models.diffusion.guidance", "ldm.models.diffusion.noise"},
    {"ldm.models.diffusion.sampler"},
    {"ldm.models.diffusion.ddim"},
    {"ldm.models.diffusion.plms", "ldm.models.diffusion.dpm_solver", "ldm.models.diffusion.ancestral"},
    {"ldm.models.diffusion.visualize"},
    {"ldm.models.diffusion"},
    {"ldm.convert", "ldm.generate", "ldm.run"},
    {"ldm.callbacks"},
    {"ldm.training_callbacks"},
    {"ldm.training"},
    {"evaluation.metrics"},
    {"evaluation.scorer"},
    {"evaluation.clip_eval"},
    {"evaluation"},
    {"main", "merge_embeddings"},
    {"scripts"},
]
FLOOR_OF = {entry: floor for floor, entries in enumerate(FLOORS) for entry in entries}
# Where the name to install is not the name to import.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "taming": "taming-transformers-rom1504",
    "open_clip": "open_clip_torch",
}
COMMANDS = ("main", "merge_embeddings", "scripts", "ldm.cli")  # these talk to the user
ANY_KIND = ("ldm.modules.embedding_io_png",)  # opens pictures only after it saw a PNG's first bytes


def sources() -> dict[str, Path]:
    """{dotted name: file} of all modules of the project."""
    files = [*ROOT.glob("*.py"), *(p for d in ("ldm", "evaluation", "scripts") for p in (ROOT / d).rglob("*.py"))]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(), filename=str(path)) for name, path in SOURCES.items()}
LIBRARY = [name for name in SOURCES if name.startswith(("ldm", "evaluation"))]


def entry(module: str) -> str | None:
    """The longest entry of the table that covers `module`."""
    covering = [e for e in FLOOR_OF if module == e or (e != "ldm" and module.startswith((f"{e}.", f"{e}_")))]
    return max(covering, key=len, default=None)


def imported(name: str) -> Iterator[tuple[int, str]]:
    """(line, module of the project) of every import that runs, lazy ones inside functions too."""
    blocks = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types_only = {id(part) for block in blocks for statement in block.body for part in ast.walk(statement)}
    for node in ast.walk(TREES[name]):
        if id(node) in for_types_only:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{base}.{alias.name}" for alias in node.names] if (base := absolute(name, node)) else []
        else:
            continue
        for target in found:
            module = target if target in SOURCES else target.rpartition(".")[0]
            if module in SOURCES and module != name:
                yield node.lineno, module


def absolute(name: str, node: ast.ImportFrom) -> str:
    """Module that a `from ... import` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name: str):
    own = entry(name)
    if own is None:
        assert not list(imported(name)), f"{name} has no floor: add it to FLOORS in {Path(__file__).name}"
        return
    for line, module in imported(name):
        other = entry(module)
        assert other is not None, f"{name}:{line}: {module} has no floor: add it to FLOORS in {Path(__file__).name}"
        assert other == own or FLOOR_OF[other] < FLOOR_OF[own], (
            f"{name}:{line} imports {module}, which is not on a lower floor: pass the object in, or move the code down"
        )


def test_no_import_cycles():
    graph = {name: {module for _, module in imported(name)} for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for module in sorted(graph[name]):
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in LIBRARY if not n.startswith(COMMANDS)])
def test_library_does_not_print(name: str):
    calls = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    lines = [call.lineno for call in calls if call.func.id == "print"]  # type: ignore[attr-defined]
    assert not lines, f"{name} prints in lines {lines}: use logging"


def device_choices(tree: ast.AST) -> Iterator[ast.expr | None]:
    """Expressions that decide a device for good: defaults of parameters and classes, and what tensors are moved to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            yield from (*node.defaults, *node.kw_defaults)
        elif isinstance(node, ast.ClassDef):
            yield from (part.value for part in node.body if isinstance(part, ast.Assign | ast.AnnAssign))
        elif isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "device")
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cuda"):
                yield from node.args or [ast.Constant(value="cuda", lineno=node.lineno)]


@pytest.mark.parametrize("name", LIBRARY)
def test_library_fixes_no_device(name: str):
    chosen = [n for n in device_choices(TREES[name]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    lines = [node.lineno for node in chosen if node.value.startswith("cuda")]
    assert not lines, f"{name} names a device in lines {lines}: take it from the tensors"


@pytest.mark.parametrize("name", [n for n in SOURCES if n not in ANY_KIND])
def test_pictures_are_opened_by_named_kinds(name: str):
    """Among all kinds, Pillow would run PostScript programs, whatever the file's name."""
    calls = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Image.open"]
    lines = [call.lineno for call in calls if "formats" not in {keyword.arg for keyword in call.keywords}]
    assert not lines, f"{name} opens pictures in lines {lines} without `formats`: use ldm.data.image.open_image"


@pytest.mark.parametrize("name", SOURCES)
def test_files_stay_short(name: str):
    count = len(SOURCES[name].read_text().splitlines())
    assert count <= MAX_LINES, f"{name} has {count} lines, more than {MAX_LINES}: split it by reason to change"


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]
    declared = {re.split(r"[^\w.-]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}
    own = {name.split(".")[0] for name in SOURCES}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for package in {n.split(".")[0] for n in names} - own - set(sys.stdlib_module_names):
                distribution = DISTRIBUTIONS.get(package, package).lower().replace("_", "-")
                assert distribution in declared, f"{name} imports {package}, which pyproject.toml does not name"
