"""Fault points at every statement of workerd, without a line in the product: a call is put before each when it is imported.

    python tests/faults/points.py       lists them: number, module, function, line

While the control page is off such a call is one look at a word of memory. See faults.page for what it does else.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import CodeType, ModuleType

    from faults.page import Page

# The numbers of a module's points begin with its place here.
MODULES = (
    *("worker", "settle", "writer", "spool", "engine", "answer", "queue", "backlog", "pool", "process", "dispatcher"),
    *("recovery", "zygote", "forkserver", "generation", "outbox", "claims", "channel", "feeder", "control", "daemon"),
    *("admission", "access", "quotas", "upkeep", "spoolfile", "rows", "frames", "socketfile", "reporter", "alarm"),
    *("session", "flow", "output", "notify", "clock", "stackfile"),
)
STRIDE = 512
WORDS, REACHED = "__fault_words__", "__fault_reached__"


class Point(NamedTuple):
    """One statement."""

    number: int
    module: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.function}:{self.line}"


class Instrument(ast.NodeTransformer):
    """Puts a call before each statement of each function."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.points: list[Point] = []
        self._names: list[str] = []
        self._base = MODULES.index(module) * STRIDE + 1
        self._depth = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._named(node, 0)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._named(node, self._depth + 1)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._named(node, self._depth + 1)

    def _named(self, node: Any, depth: int) -> ast.AST:
        before, self._depth = self._depth, depth
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()
        self._depth = before
        return node  # type: ignore[no-any-return]  # `node` is any kind that has a name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, self._each(node, field, statements))
        return node

    def _each(self, node: ast.AST, field: str, statements: list[Any]) -> list[Any]:
        found: list[Any] = []
        for statement in statements:
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            declared = isinstance(statement, ast.Global | ast.Nonlocal)
            inside = self._depth and isinstance(statement, ast.stmt) and not isinstance(node, ast.ClassDef)
            if inside and not text and not declared:
                found.append(self._call(statement))
            found.append(self.visit(statement))
        return found

    def _call(self, statement: ast.stmt) -> ast.stmt:
        number = self._base + len(self.points)
        self.points.append(Point(number, self.module, ".".join(self._names), statement.lineno))
        call = ast.parse(f"{WORDS}[0] and {REACHED}({number})").body[0]
        for part in ast.walk(call):
            ast.copy_location(part, statement)
        return call


def instrumented(module: str, source: bytes) -> tuple[ast.AST, list[Point]]:
    """The module's tree with its points in it."""
    instrument = Instrument(module)
    tree = instrument.visit(ast.parse(source))
    if len(instrument.points) >= STRIDE:
        raise ValueError(f"{module} has more statements than there are numbers for; raise STRIDE")
    return tree, instrument.points


class Loader(SourceFileLoader):
    """Loads a module with its points."""

    names: Mapping[str, object]

    def get_code(self, fullname: str) -> CodeType:
        tree, _ = instrumented(fullname.rpartition(".")[2], self.get_data(self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)  # type: ignore[call-overload,no-any-return]  # any tree

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.names)
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds the modules that have points."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.rpartition(".")
        if package != "workerd" or module not in MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = loader = Loader(fullname, spec.origin)
        loader.names = self._names
        return spec


def install(page: Page, role: int) -> None:
    """Give this process, and what it forks, its points."""
    from faults.page import FORK_SERVER, WORKER

    page.role = role
    if role == FORK_SERVER:
        page.serve()

    def forked() -> None:
        page.role = WORKER if page.role == FORK_SERVER else 0  # what a job forks is nobody's

    os.register_at_fork(after_in_child=forked)
    sys.meta_path.insert(0, Finder({WORDS: page.words, REACHED: page.reached}))


def all_points() -> dict[int, Point]:
    """Every point by its number."""
    spec = importlib.util.find_spec("workerd")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    found = [instrumented(module, (folder / f"{module}.py").read_bytes())[1] for module in MODULES]
    return {point.number: point for points in found for point in points}


if __name__ == "__main__":
    for each in all_points().values():
        print(each.number, each.module, each.function, each.line)
