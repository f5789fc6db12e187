"""Limits that may be lowered, never raised: functions with many parameters, and public names."""

from __future__ import annotations

import ast

from house import code_lines, parameters, wide_functions

import corda_kernels

WIDE_FUNCTIONS = 7  # with more than seven parameters, outside kernels and the command line
PARAMETERS = 12
PUBLIC_NAMES = 25


def test_the_package_stays_within_its_limits() -> None:
    wide = dict(wide_functions())
    assert len(wide) <= WIDE_FUNCTIONS, wide
    assert max(wide.values(), default=0) <= PARAMETERS, wide
    assert len(corda_kernels.__all__) <= PUBLIC_NAMES


def test_lines_of_code_are_those_without_comments_docstrings_and_blanks() -> None:
    source = '''"""What it is,
over two lines."""

import math  # a comment behind code


# A comment alone.
class Circle:
    """A circle."""

    def area(self, r: float) -> float:
        """Its area."""
        text = """a string,
        no docstring"""
        return math.pi * len(text)
'''
    assert code_lines(source) == 6


def test_every_parameter_counts_but_self() -> None:
    (found,) = ast.parse("def f(self, a, /, b, *args, c=1, **kwargs): ...").body
    assert isinstance(found, ast.FunctionDef)
    assert parameters(found) == 5
