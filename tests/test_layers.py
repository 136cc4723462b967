"""Imports run downward only: from package to package, and inside dino_fast and shards from room to room.

A room is a file or a folder of a package. No two modules import each other, by whatever detour.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("shards", "pipelines", "dino_fast", "bench")  # lowest first
ABOVE = {layer: {*LAYERS[number + 1 :], "tests", "docs"} for number, layer in enumerate(LAYERS)}
# shards runs on machines that only pack; the data path and the model are torch's.
FORBIDDEN = {
    layer: ABOVE[layer] | ({"torch", "torchvision", "nvidia"} if layer == "shards" else set()) for layer in LAYERS
}
# Highest first. Rooms of one row do not import each other.
ROOMS = {
    "dino_fast": (
        ("__main__",),
        ("completion",),
        ("demo",),
        ("advise",),
        ("train",),
        ("run",),
        ("config_help",),
        ("config",),
        ("config_checks", "other_names"),
        ("evaluate",),
        ("weights",),
        ("step",),
        ("model",),
        ("checkpoint", "distributed", "durations"),
    ),
    "shards": (
        ("__main__",),
        ("commands",),
        ("arguments",),
        ("argument_groups",),
        ("argument_types", "completion", "messages"),
        ("inspect",),
        ("packing",),
        ("sources",),
        ("index",),
        ("cache",),
        ("images",),
        ("storage",),
        ("manifest", "record_checks"),
        ("layout", "manifest_checks"),
        ("counts", "errors", "progress", "text", "version"),
    ),
}


def find_imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every module or name that a module imports, anywhere in it, with dots, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((str(arg.value), node.lineno) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def read_modules(package: str, root: Path = ROOT) -> dict[str, list[tuple[str, int]]]:
    """Return the modules of a package by their names with dots, each with the modules that it imports and the lines."""
    files = sorted((root / package).rglob("*.py"))
    names = {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    modules = {}
    for name, file in names.items():
        found = find_imports(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        modules[name] = [
            (target if target in names else target.rpartition(".")[0], line)
            for target, line in found
            if target.split(".")[0] == package
        ]
    return modules


def room_of(module: str) -> str:
    """Return the room of a module, e.g. "step" for dino_fast.step.loss, or "" for the package itself."""
    return [*module.split("."), ""][1]


def find_circle(modules: dict[str, list[tuple[str, int]]]) -> list[str]:
    """Return modules that import each other in a circle, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target, _ in modules.get(name, ()):
            if circle := visit(target, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in modules if (circle := visit(name, []))), [])


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downward(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in find_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if name.split(".")[0] in FORBIDDEN[layer]
    ]
    assert not upward, (
        "imports run bench → dino_fast → pipelines → shards. Move the code that is needed below into the lower "
        "package, or pass it as an argument:\n" + "\n".join(upward)
    )
    assert files, f"{layer}/ has no Python file"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downward(package: str) -> None:
    rank = {room: number for number, row in enumerate(ROOMS[package]) for room in row}
    modules = read_modules(package)
    unknown = sorted({room_of(module) for module in modules} - {"", *rank})
    assert not unknown, f"{package}/ has new rooms: {', '.join(unknown)}. Give each its place in ROOMS of this test."
    upward = [
        f"{module} (line {line}) imports {target}"
        for module, targets in modules.items()
        for target, line in targets
        if room_of(module) and room_of(target) != room_of(module)
        if not room_of(target) or rank[room_of(target)] <= rank[room_of(module)]
    ]
    assert not upward, (
        "a room imports only rooms below it in ROOMS of this test. Move what both need into a lower room, "
        "pass it as an argument, or change the order here and in docs/design.md:\n" + "\n".join(upward)
    )


@pytest.mark.parametrize("package", LAYERS)
def test_no_modules_import_each_other(package: str) -> None:
    circle = find_circle(read_modules(package))
    assert not circle, (
        f"{' imports '.join(circle)}: a circle. Move what both need into a third module that imports neither."
    )


def test_the_check_sees_every_form_of_import() -> None:
    lines = [
        "import bench.loader as b",
        "from tests import x",
        "importlib.import_module('torch.nn')",
        "from . import y",
    ]
    source = "def f():\n " + "\n ".join(lines)
    assert {name for name, _ in find_imports(ast.parse(source))} == {"bench.loader", "tests.x", "torch.nn"}


def test_the_check_finds_a_circle_by_a_detour(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    (folder / "room").mkdir(parents=True)
    (folder / "a.py").write_text("from package.room.b import thing\n")
    (folder / "room" / "__init__.py").write_text("")
    (folder / "room" / "b.py").write_text("def late():\n    from package import c\n")
    (folder / "c.py").write_text("import package.a\n")
    assert sorted(set(find_circle(read_modules("package", tmp_path)))) == ["package.a", "package.c", "package.room.b"]
    (folder / "c.py").write_text("")
    assert find_circle(read_modules("package", tmp_path)) == []
