"""How large the package is: lines of code, public names, functions with many parameters.

    python benches/house.py

A line counts if it holds code: no comment, docstring or blank line. A function's parameters are
all but `self` and `cls`; kernels and the command line may have as many as they need.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "corda_kernels"
MANY = 7
EXEMPT = {"kernels", "cli"}

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def sources() -> dict[str, str]:
    """The package's files, by their paths below it."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in files}


def code_lines(source: str) -> int:
    """The number of lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of a function's parameters, `*args` and `**kwargs` among them."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    starred = [each for each in (given.vararg, given.kwarg) if each is not None]
    return len(starred) + sum(each.arg not in ("self", "cls") for each in named)


def wide_functions() -> Iterator[tuple[str, int]]:
    """Functions of more than seven parameters, as file:line name, with how many they have."""
    for file, source in sources().items():
        if Path(file).parts[0] in EXEMPT:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = parameters(node)
                if count > MANY:
                    yield f"{file}:{node.lineno} {node.name}", count


def main() -> None:
    """Prints all of it."""
    import corda_kernels

    folders: dict[str, int] = {}
    for file, source in sources().items():
        part = Path(file).parts[0]
        folders[part] = folders.get(part, 0) + code_lines(source)
    for part, lines in sorted(folders.items(), key=lambda item: -item[1]):
        print(f"{lines:6} {part}")
    print(f"{sum(folders.values()):6} lines of code")
    print(f"{len(corda_kernels.__all__):6} public names")
    wide = sorted(wide_functions(), key=lambda item: -item[1])
    print(f"{len(wide):6} functions with more than {MANY} parameters")
    for where, count in wide:
        print(f"{count:6} {where}")


if __name__ == "__main__":
    main()
