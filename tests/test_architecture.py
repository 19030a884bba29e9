"""The rooms of the house: who may import whom, what lies at the front door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workerd"

# A module imports from lower layers only ...
LAYERS: list[set[str]] = [
    {"clock", "early", "errors", "job", "values"},
    {
        "access",
        "alarm",
        "changes",
        "protocol",
        "config",
        "backlog",
        "line",
        "schedule",
        "queue",
        "quotas",
        "deadcounts",
        "claims",
        "frames",
        "log",
        "outbox",
        "ratelimit",
        "output",
        "rows",
        "spoolfile",
        "stackfile",
        "upkeep",
    },
    {
        *(
            "spool",
            "view",
            "writer",
            "reader",
            "feeder",
            "session",
            "flow",
            "hangups",
            "socketfile",
            "metrics",
            "scrape",
            "notify",
        ),
        *(
            "worker",
            "zygote",
            "forkserver",
            "channel",
            "process",
            "generation",
            "settle",
            "dispatcher",
            "pool",
            "starts",
        ),
    },
    {"answer", "engine", "joblog", "admission", "deadjobs", "control", "recovery", "reporter", "daemon"},
    {
        *("cli", "check", "exits", "export", "reports", "submission", "daemonize", "terminal"),
        *("client", "connection", "exchange", "lines", "pipeline", "replies", "local", "__main__", "__init__"),
    },
]
# ... and, beside itself, only as said here.
NEIGHBOURS: dict[str, set[str]] = {
    "config": {"access"},
    "schedule": {"line"},
    "backlog": {"line", "schedule"},
    "queue": {"backlog", "quotas"},
    "rows": {"changes"},
    "quotas": {"changes"},
    "deadcounts": {"changes", "quotas"},
    "upkeep": {"spoolfile"},
    "session": {"flow"},
    "flow": {"hangups"},
    "feeder": {"flow", "session"},
    "spool": {"view"},
    "writer": {"spool"},
    "reader": {"spool", "view", "writer"},
    "zygote": {"worker"},
    "forkserver": {"worker", "zygote"},
    "process": {"worker", "channel"},
    "generation": {"forkserver", "process", "starts", "zygote"},
    "settle": {"worker", "process"},
    "dispatcher": {"process", "settle"},
    "pool": {"worker", "forkserver", "process", "generation", "settle", "dispatcher", "starts"},
    "engine": {"joblog"},
    "admission": {"answer", "engine"},
    "deadjobs": {"admission", "engine"},
    "control": {"admission", "deadjobs", "engine"},
    "reporter": {"control"},
    "daemon": {"engine", "admission", "control", "recovery", "reporter"},
    "lines": {"replies"},
    "pipeline": {"connection", "lines", "replies"},
    "client": {"connection", "exchange", "lines", "pipeline", "replies"},
    "exchange": {"replies"},
    "exits": {"terminal"},
    "export": {"terminal"},
    "reports": {"client", "terminal"},
    "submission": {"client", "lines", "pipeline", "replies", "terminal"},
    "check": {"terminal"},
    "cli": {"check", "client", "daemonize", "exits", "export", "reports", "submission", "__init__"},
    "__main__": {"cli"},
    "__init__": {"client", "local"},
}
# What a program that talks to the daemon loads must not be the daemon.
HIGHEST_LAYER_SEEN = dict.fromkeys(("client", "connection", "exchange", "lines", "pipeline", "replies"), 1)
# These import nothing of the package, and nothing of it imports them.
ALONE = {"examples"}

# No clock, no sleep, no I/O: these get all they know passed in.
PURE = {
    "errors",
    "job",
    "changes",
    "line",
    "schedule",
    "backlog",
    "queue",
    "quotas",
    "deadcounts",
    "protocol",
    "frames",
    "ratelimit",
}
IMPURE = {
    *("asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "select", "signal"),
    *("socket", "sqlite3", "subprocess", "threading", "time", "uvloop"),
}
# The user's code is imported in a child; nobody else may import by name.
IMPORTS_BY_NAME = {"zygote"}

TOP = {"workerd", "etc", "systemd", "tests", "pyproject.toml", "README.md", "LICENSE"}
DISTRIBUTIONS = {"daemon": "python-daemon", "prometheus_client": "prometheus-client"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


@cache
def imported(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The package's own modules, and the other top-level ones, that the module imports, wherever in it."""
    own: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports of the package in full"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top != "workerd":
                others.add(top)
            elif rest == "__version__":
                continue  # anybody may know it
            elif (first := rest.partition(".")[0]) in MODULES:
                own.add(first)
            else:
                own.add("__init__")
    return frozenset(own), frozenset(others)


@cache
def files() -> tuple[Path, ...]:
    """Every file of the repository that git does not ignore; without git, every file that has no dot."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.check_output(command, cwd=ROOT).decode().split("\0")
        found = (ROOT / name for name in names if name)
    else:
        found = (path for path in ROOT.rglob("*") if not path.relative_to(ROOT).parts[0].startswith("."))
    return tuple(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def layer(module: str) -> int:
    for number, modules in enumerate(LAYERS):
        if module in modules:
            return number
    pytest.fail(f"{module} has no place in the table LAYERS")


def test_every_module_has_a_layer() -> None:
    """The table above is the whole package: a module that comes or goes is entered here."""
    assert set(MODULES) == set.union(*LAYERS) | ALONE


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    """A module imports from the layers below it, and from the neighbours that the table allows it."""
    own, _ = imported(module)
    if module in ALONE:
        assert not own
        return
    top = HIGHEST_LAYER_SEEN.get(module, layer(module) - 1)
    allowed = set().union(*LAYERS[: top + 1]) | NEIGHBOURS.get(module, set())
    assert own - allowed == set()


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_touch_nothing(module: str) -> None:
    """What decides knows no clock, file or socket, so that its tests are histories of events as data."""
    _, others = imported(module)
    assert others & IMPURE == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - IMPORTS_BY_NAME))
def test_only_children_import_by_name(module: str) -> None:
    """The user's code never comes into the daemon: only what runs in a child has the means to import it."""
    _, others = imported(module)
    assert others & {"importlib", "runpy", "pkgutil"} == set()
    assert "__import__" not in (PACKAGE / f"{module}.py").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_in_is_never_run(module: str) -> None:
    """Nothing is evaluated, nothing handed to a shell; pickles, which come from the program itself, are read in the
    workers of StartWorkers only. What is in SQL is bound, but for constants, where ruff (S608) has us say so.
    """
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called & {"eval", "exec", "compile"} == set()
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes & {"system", "popen"} == set()
    _, others = imported(module)
    assert others & {"marshal", "shelve"} == set()
    assert "pickle" not in others or module in {"worker", "local"}


def test_dependencies_are_those_imported() -> None:
    """What the package imports is declared, and what is declared is imported."""
    used = {name for module in MODULES for name in imported(module)[1]} - sys.stdlib_module_names
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=~! ]", requirement)[0] for requirement in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in used} == declared


def test_top_level_holds_nothing_else() -> None:
    """The first listing that a visitor sees is short: no file lies there that could lie deeper."""
    assert {top for path in files() if not (top := path.relative_to(ROOT).parts[0]).startswith(".")} == TOP


def test_no_file_knows_a_builders_machine() -> None:
    """No path of the machine that something was written on is left in a file."""
    pattern = re.compile(rb"(?<![\w.-])(/" + rb"work/|/tmp/" + rb"venv)")
    assert [path for path in files() if pattern.search(path.read_bytes())] == []
