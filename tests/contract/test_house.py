"""The house keeps its own rules: small files, functions and constructors, no processes where none belong, one constant of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.harness import REPOSITORY

PACKAGE = REPOSITORY / "gai_yolo"
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_ARGUMENTS = 300, 50, 7


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and tree of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield str(path.relative_to(REPOSITORY)), text, ast.parse(text)


def test_no_file_is_longer_than_one_sitting() -> None:
    """Loss: a module that nobody reads to its end, where what is changed at the top breaks the bottom."""
    lengths = {name: len(text.splitlines()) for name, text, _ in modules()}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_and_no_constructor_is_too_large() -> None:
    """Loss: a function whose ends nobody sees together, a class that is handed half of the program."""
    found, seen = [], 0
    for name, _, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            seen += 1
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if lines > MOST_LINES_OF_FUNCTION:
                found.append(f"{name}: {node.name} has {lines} lines")
            if node.name == "__init__" and len(arguments) - 1 > MOST_ARGUMENTS:
                found.append(f"{name}: a constructor has {len(arguments) - 1} arguments")
    assert seen > 1000
    assert found == []


def test_detector_and_data_know_no_processes() -> None:
    """Loss: a network, or a sample, that is another one on another rank. (Import-linter sees this package's own modules only.)"""
    for name, _, tree in modules():
        if name.startswith(("gai_yolo/detector/", "gai_yolo/data/")):
            imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert not [module for module in imported if module.startswith("torch.distributed")], name


def test_constants_of_one_name_are_one_constant() -> None:
    """Loss: a limit that is raised in one place, while another of its name stands elsewhere and holds."""
    places = defaultdict(list)
    for name, _, tree in modules():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(one, ast.Name) and one.id.isupper() and len(one.id) > 1 and not one.id.startswith("_"):
                        places[one.id].append(name)
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
