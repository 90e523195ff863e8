"""The rules of docs/architecture.md and CONTRIBUTING.md that a program can check."""

import ast
import pathlib
import re

import pytest

import eqx_moe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "eqx_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
FAMILY_FREE = ("nn", "kernels", "execution", "checkpoint", "remote")
FOREIGN = {"torch", "transformers", "convert"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def unit(module: str) -> str:
    """The part of the package that a module belongs to: `eqx_moe.nn.decoder` is of `nn`."""
    return module.split(".")[1]


def below() -> dict[str, set[str]]:
    """What each part may import: everything to its left in a chain such as `errors < nn < generation, train`."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    chains = [
        [{name.strip() for name in step.split(",")} for step in line.split("<")]
        for line in page.splitlines()
        if re.fullmatch(r"    \w[\w, ]*( < \w[\w, ]*)+", line)
    ]
    assert chains, "docs/architecture.md shows no chain `a < b < c`"
    order = {name: set() for chain in chains for step in chain for name in step}
    for _ in order:  # As many rounds as there are parts: then chains that meet have passed everything on.
        for chain in chains:
            for left, right in zip(chain, chain[1:], strict=False):
                for name in right:
                    order[name] |= left.union(*(order[lower] for lower in left))
    cyclic = [name for name in order if name in order[name]]
    assert not cyclic, f"docs/architecture.md has a cycle through {cyclic}"
    return order


def imports(tree: ast.AST) -> list[tuple[int, str, str | None]]:
    """All imports, those inside functions too: line, module, and the name taken from it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(node.lineno, node.module, alias.name) for alias in node.names]
    return found


def imported_units(tree: ast.AST) -> list[tuple[int, str]]:
    """The parts of the package that a file imports, with the line."""
    found = []
    for line, module, name in imports(tree):
        if module.split(".")[0] != "eqx_moe" or name == "__version__":
            continue
        if module == "eqx_moe":
            assert name is not None, f"line {line}: inside the package, import from the module where a name stands"
            home = eqx_moe._PUBLIC.get(name, "eqx_moe")
            module = f"eqx_moe.{name}" if home == "eqx_moe" else home
        found.append((line, unit(module)))
    return found


@each_file
def test_imports_point_one_way(file):
    if file == PACKAGE / "__init__.py":
        return
    order = below()
    own = unit(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert own in order, f"docs/architecture.md does not say where `{own}` stands in the order of imports"
    wrong = [
        f"line {line}: `{own}` imports `{other}`"
        for line, other in imported_units(ast.parse(file.read_text()))
        if other != own and other not in order[own]
    ]
    assert not wrong, wrong


def test_the_front_page_imports_nothing_early():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    early = [
        module for node in tree.body for _, module, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert set(early) == {"importlib", "os", "typing"}


@each_file
def test_nothing_foreign_and_no_pickles(file):
    tree = ast.parse(file.read_text())
    wrong = [f"line {line}: {module}" for line, module, _ in imports(tree) if module.split(".")[0] in FOREIGN | PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    wrong.append(f"line {node.lineno}: allow_pickle")
    assert not wrong, wrong


def family_words() -> re.Pattern:
    """The families' names without their version: `qwen` for qwen2 and qwen3."""
    names = {file.stem for file in (PACKAGE / "family").glob("*.py")} - {"__init__", "base"}
    words = {name.rstrip("0123456789") for name in names if name in eqx_moe.families()}
    assert "mixtral" in words
    # `llama3` is the name of a rotary embedding's frequency rule, which several families use.
    return re.compile("|".join(sorted(words)).replace("llama", "llama(?!3)"), re.IGNORECASE)


def code_words(tree: ast.AST) -> list[tuple[int, str]]:
    """Every name and every string of a file but its docstrings, with the line."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        if id(node) not in docstrings:
            found += [(getattr(node, "lineno", 0), word) for word in words]
    return found


def test_shared_parts_know_no_family():
    pattern = family_words()
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {word!r}"
        for part in FAMILY_FREE
        for file in sorted((PACKAGE / part).rglob("*.py"))
        for line, word in code_words(ast.parse(file.read_text()))
        if pattern.search(word)
    ]
    assert not wrong, "\n".join(wrong)


@each_file
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 500, "split it by idea"


def test_no_dumping_grounds():
    banned = {"utils", "util", "helpers", "common", "misc"}
    assert not [file for file in FILES if file.stem in banned or file.parent.name in banned]
