"""The order of the house: which file imports which, where imports stand, and how long files are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ldm_fused", "benchmarks", "tools")
BINARIES = ("ldm_fused._C",)
PRODUCT = ("ldm_fused/**/*.py", "csrc/**/*.*")
MOST_LINES, MOST_LINES_OF_RESULTS = 450, 1500


# ---- Imports -----------------------------------------------------------------------------------------------------


def modules(root):
    """The path of each module, by its dotted name; a package is its __init__.py."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(name, path):
    """The dotted names that a module imports, those inside its functions too; of `from a import b`, "a.b"."""
    here = name.split(".") + (["__init__"] if path.name == "__init__.py" else [])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*(here[:-node.level] if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imported_modules(name, path, known):
    """The known modules that must have run when a module has run its imports."""
    for imported in imports(name, path):
        parts = imported.split(".")
        found = [prefix for i in range(len(parts)) if (prefix := ".".join(parts[:i + 1])) in known]
        # The packages above it run too, except those that the importing module lies in itself: they run already.
        yield from (m for m in found if m == found[-1] and imported not in BINARIES or not name.startswith(f"{m}."))


def circle(root):
    """The names of modules of which each imports the next, and the last the first; or None."""
    known = modules(root)
    graph = {name: set(imported_modules(name, path, known)) - {name} for name, path in known.items()}
    done = set()

    def visit(name, way):
        if name in way:
            return way[way.index(name):]
        if name not in done:
            for other in sorted(graph[name]):
                found = visit(other, [*way, name])
                if found:
                    return found
            done.add(name)
        return None

    return next(filter(None, (visit(name, []) for name in graph)), None)


def late_imports(path):
    """The lines of imports that stand behind other code, without a comment."""
    lines, tree = path.read_text().splitlines(), ast.parse(path.read_text())
    top = []
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (is_docstring or isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))):
            break
        top += ast.walk(node)
    late = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n not in top]
    return [n.lineno for n in late if "#" not in lines[n.lineno - 1] and "#" not in lines[n.lineno - 2]]


def test_no_modules_import_each_other_in_a_circle():
    found = circle(ROOT)
    assert found is None, " -> ".join([*found, found[0]])


def test_imports_stand_at_the_top_or_say_why_not():
    found = {name: late_imports(path) for name, path in modules(ROOT).items() if name.startswith("ldm_fused")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("back", ["from . import first", "import ldm_fused.first", "from .first import f",
                                  "from ldm_fused.first import f", "def f():\n    from . import first"])
def test_a_circle_is_found(tmp_path, back):
    write(tmp_path, {"ldm_fused/__init__.py": "from .first import f", "ldm_fused/first.py": "from .second import g",
                     "ldm_fused/second.py": "import torch"})
    assert circle(tmp_path) is None
    write(tmp_path, {"ldm_fused/second.py": back})
    assert circle(tmp_path) == ["ldm_fused.first", "ldm_fused.second"]


def test_a_circle_through_a_package_is_found(tmp_path):
    """To import a module is to run the package that it lies in."""
    write(tmp_path, {"ldm_fused/modules.py": "from .patching import trial", "ldm_fused/patching/trial.py": "",
                     "ldm_fused/patching/api.py": "from .. import modules", "ldm_fused/patching/__init__.py": ""})
    assert circle(tmp_path) is None
    write(tmp_path, {"ldm_fused/patching/__init__.py": "from .api import patch"})
    assert set(circle(tmp_path)) == {"ldm_fused.modules", "ldm_fused.patching", "ldm_fused.patching.api"}


@pytest.mark.parametrize("text, lines", [
    ('"""What."""\nimport a\ntry:\n    import b\nexcept ImportError:\n    pass\nfrom . import c\n', []),
    ("import a\nb = 1\nimport c\n", [3]),
    ("import a\ndef f():\n    from . import c\n", [3]),
    ("def f():\n    import c  # c takes a second\n", []),
])
def test_a_late_import_is_found(tmp_path, text, lines):
    write(tmp_path, {"module.py": text})
    assert late_imports(tmp_path / "module.py") == lines


# ---- Lengths -----------------------------------------------------------------------------------------------------


def lengths(root, *patterns):
    paths = (path for pattern in patterns for path in root.glob(pattern) if path.suffix not in (".so", ".pyc"))
    return {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in paths if path.is_file()}


def too_long(root):
    return {path: lines for path, lines in lengths(root, *PRODUCT).items() if lines > MOST_LINES}


def results(root):
    return sum(lengths(root, "benchmarks/results/**/*").values())


def test_no_file_of_the_product_is_long():
    assert too_long(ROOT) == {}


def test_results_stay_short():
    assert 0 < results(ROOT) < MOST_LINES_OF_RESULTS


def test_lengths_are_of_all_files_in_all_folders(tmp_path):
    long = {"ldm_fused/patching/a.py": 451, "ldm_fused/b.py": 450, "csrc/cuda/c.cuh": 1000, "csrc/d.h": 1,
            "benchmarks/results/a.json": 700, "benchmarks/results/b/c.md": 900}
    write(tmp_path, {name: "line\n" * lines for name, lines in long.items()})
    assert too_long(tmp_path) == {"ldm_fused/patching/a.py": 451, "csrc/cuda/c.cuh": 1000}
    assert results(tmp_path) == 1600
