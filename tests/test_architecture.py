"""The layers of the package: imports only downwards, and one place that knows what a family's layer looks like."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "slimllm"
# From the lowest to the highest; a name stands for a module or a whole sub-package. Those of one line know nothing of each other.
TIERS = (
    ("errors", "modeling"),
    ("plugins",),
    ("utils", "cli"),
    ("models",),
    ("settings", "auto_classes"),
    ("data", "plan"),
    ("streaming",),
    ("run",),
    ("pruning", "evaluation", "deploy", "training"),
    ("reporting",),
    ("footprint", "forecast"),
    ("stages",),
    ("api",),
    ("experiments",),
    ("commands",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(TIERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

PARTS = re.compile(r"\b([qkvo]_proj|gate_proj|up_proj|down_proj|self_attn|lm_head|embed_tokens|\w*_layernorm)\b")
KNOW_PARTS = {"models/families.py", "modeling.py", "experiments/plain.py"}


def part_of(path: Path) -> str:
    """The sub-package, or module at the top, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, at its top or inside its functions, but not for annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimllm")), f"{path}: use a relative import"
            continue
        folder = path.parents[node.level - 1]
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            target = folder.joinpath(*name.split("."))
            found.add(part_of(target if target.is_relative_to(PACKAGE) and target != PACKAGE else path))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    part = part_of(path)
    for name in imported(path) - {part, "__init__"}:
        assert LEVEL[name] < LEVEL[part], f"{path.relative_to(PACKAGE)} imports {name}, which stands beside or above it"


def test_every_part_has_its_place():
    assert {part_of(path) for path in MODULES} == set(LEVEL)


def test_modeling_stands_alone():
    """It is copied beside every checkpoint."""
    assert not imported(PACKAGE / "modeling.py")


def words_of(path: Path) -> list[str]:
    """Attribute names and string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    words = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return words + [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings]


def test_only_the_family_table_names_projections():
    named = {str(path.relative_to(PACKAGE)): found for path in MODULES if (found := [w for w in words_of(path) if PARTS.search(w)])}
    assert set(named) <= KNOW_PARTS, named
    assert "models/families.py" in named


def modules_imported(path: Path) -> set[Path]:
    """The modules of the package that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split(".") if node.module else ())
            places = [folder, *(folder / alias.name for alias in node.names)]
            found |= {place.with_suffix(".py") for place in places} | {place / "__init__.py" for place in places}
    return found & set(MODULES)


def test_no_module_imports_itself_by_way_of_others():
    """Nor for its annotations alone: a class that an annotation names is imported as any other."""
    assert not [path for path in MODULES if "TYPE_CHECKING" in path.read_text()]
    left = {path: modules_imported(path) - {path} for path in MODULES}
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    assert not left, sorted(str(path.relative_to(PACKAGE)) for path in left)
