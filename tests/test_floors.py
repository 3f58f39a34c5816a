"""The house rules that a machine can check: what imports what, where NNX may stand, who names a method, file sizes."""

import ast
import re
from pathlib import Path

import pytest

from tunejax.methods import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tunejax"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "core": 1,
    "methods": 2,
    "objectives": 2,
    "models": 2,
    "data": 2,
    "train": 3,
    "generate": 3,
    "evaluate": 4,
    "interop": 4,
    "config": 5,
    "recipes": 5,
    "cli": 5,
    "plots": 5,
    "assets": 5,
}
BANNED = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer", "LoRA", "LoRAParam", "LoRALinear"}
METHODS = {*registry.NAMES, "lora", "qlora", "dora", "adalora", "ia3", "bitfit", "prefix_tuning", "houlsby", "pfeiffer"}
COMMON_WORDS = {"full", "said", "gated"}
"""Names of methods that are English too: a policy of rematerialisation, a mask, an MLP may be called so."""


def name_of(file: Path) -> str:
    """tunejax/train/step.py -> tunejax.train.step; a package is its __init__."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """tunejax.train.step -> train; tunejax itself is ""."""
    return (module.split(".") + [""])[1]


def imports(file: Path, *, inside_functions: bool = True) -> set[str]:
    """The modules of tunejax that a file imports."""
    known = {name_of(f) for f in FILES}
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else ast.iter_child_nodes(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {m for m in found if m.split(".")[0] == "tunejax"}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_go_down(file):
    here = part(name_of(file))
    for module in imports(file):
        there = part(module)
        if not here or not there or here == there:
            continue
        assert FLOORS[there] <= FLOORS[here], f"{relative(file)} (floor {FLOORS[here]}) imports {module}"
        if FLOORS[here] == 2:
            assert FLOORS[there] == 1, f"{relative(file)} imports {module}, another package of its floor"


def test_every_part_has_a_floor():
    assert {part(name_of(f)) for f in FILES} - {""} <= set(FLOORS)


def test_no_cycles():
    graph = {name_of(f): imports(f, inside_functions=False) for f in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                if other != module:
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", [f for f in FILES if part(name_of(f)) == "methods"], ids=relative)
def test_no_method_imports_another(file):
    others = {m for m in imports(file) if part(m) == "methods"} - {"tunejax.methods"}
    assert not others, f"{relative(file)} imports {others}"


def nnx_uses(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    uses = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) == "nnx"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax"):
            uses |= {f"import {a.name}" for a in node.names}
        if isinstance(node, ast.Import):
            uses |= {f"import {a.name}" for a in node.names if a.name.startswith("flax")}
    return uses


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_nnx_stays_in_models(file):
    uses = nnx_uses(file)
    if part(name_of(file)) != "models":
        assert not uses, f"{relative(file)} uses flax: {uses}"
    assert not uses & BANNED, f"{relative(file)} uses nnx.{uses & BANNED}"


@pytest.mark.parametrize("file", [f for f in FILES if part(name_of(f)) in ("train", "models")], ids=relative)
def test_nobody_else_names_a_method(file):
    words = set(re.findall(r"[a-z0-9_]+", file.read_text(encoding="utf-8").lower()))
    assert not words & (METHODS - COMMON_WORDS)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_files_are_short_and_finished(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", text)
    assert "raise NotImplementedError" not in text or _is_abstract(text), f"{relative(file)} is unfinished"


def _is_abstract(text: str) -> bool:
    """Every NotImplementedError is the whole body of a documented method of a base class."""
    tree = ast.parse(text)
    raises = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and "NotImplementedError" in ast.unparse(n)]
    bodies = [f.body for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body if hasattr(f, "body")]
    whole = [b[1] for b in bodies if len(b) == 2 and isinstance(b[1], ast.Raise)]
    return all(r in whole for r in raises)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_what_is_public_is_documented(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(file)} has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{relative(file)}: {node.name} has no docstring"
