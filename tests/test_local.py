"""The seed library's contract: `StartWorkers` in any program, each program a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from daemon_process import Process, wait_until

from workerd import StartWorkers

ROOT = Path(__file__).parents[1]

# The seed's own example, ported to Python 3: print, range, the module's name, and nothing else.
SEED_EXAMPLE = """\
from workerd import StartWorkers

class WorkerAttributes(object):

\tdef test(self, arguments):

\t\tprint(arguments)



AttributeInstance = WorkerAttributes()
jobQueue = StartWorkers(1, AttributeInstance)

for i in range(10):

    jobQueue.put({"target":"test", "arguments": "Hello, World!"})
"""


def program(tmp_path: Path, source: str) -> subprocess.Popen[str]:
    path = tmp_path / "program.py"
    path.write_text(source)
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tmp_path: Path, source: str) -> tuple[str, str]:
    process = program(tmp_path, source)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def test_the_seeds_own_example(tmp_path: Path) -> None:
    """Ten times "Hello, World!", no guard, and the program ends by itself with nothing left."""
    out, err = run(tmp_path, SEED_EXAMPLE)
    assert out == "Hello, World!\n" * 10
    assert err == ""


def test_arguments_are_anything_that_pickles(tmp_path: Path) -> None:
    """Sets, complex numbers, instances of the program's own classes; and None when they are left out."""
    source = """
from workerd import StartWorkers
class Own:
    def __init__(self, x): self.x = x
class A:
    def show(self, arguments): print(getattr(arguments, "x", arguments), flush=True)
queue = StartWorkers(1, A)
for arguments in ({1}, 2j, Own("own"), b"\\0"):
    queue.put({"target": "show", "arguments": arguments})
queue.put({"target": "show"})
"""
    assert run(tmp_path, source)[0].splitlines() == ["{1}", "2j", "own", "b'\\x00'", "None"]


def test_false_retires_workers_after_the_jobs_put_before(tmp_path: Path) -> None:
    """As many False as workers retires all; what was put before is run, what comes after is left, and that is said."""
    source = """
import os
from workerd import StartWorkers
class A:
    def show(self, arguments): os.write(1, f"{arguments}\\n".encode())
queue = StartWorkers(2, A())
for number in range(100): queue.put({"target": "show", "arguments": number})
queue.put(False)
queue.put(False)
queue.put({"target": "show", "arguments": "too late"})
"""
    out, err = run(tmp_path, source)
    assert sorted(map(int, out.split())) == list(range(100))
    assert "1 jobs were left, because every worker was retired" in err


def test_kill_of_the_program_takes_the_workers_along(tmp_path: Path) -> None:
    """SIGKILL of the program, one of its workers asleep and one busy in a C call: all are gone within a second."""
    source = """
import ctypes, os, sys
from workerd import StartWorkers
class A:
    def pid(self, arguments):
        os.write(1, f"{os.getpid()} {os.getppid()}\\n".encode())
        ctypes.PyDLL(None).sleep(600)
queue = StartWorkers(2, A())
for _ in range(2): queue.put({"target": "pid"})
queue.join()
"""
    process = program(tmp_path, source)
    assert process.stdout is not None
    pids = {int(pid) for _ in range(2) for pid in process.stdout.readline().split()}
    family = [found for pid in pids if (found := Process.of(pid))]
    assert len(family) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(member.alive for member in family), "all gone", 1.0)
    process.communicate()


def test_a_killed_worker_is_replaced_and_no_other_job_suffers(tmp_path: Path) -> None:
    """The job that kills is tried on max_crashes workers and given up; the hundred around it run once each."""
    source = """
import os, signal
from workerd import StartWorkers
class A:
    def show(self, arguments): os.write(1, f"{arguments}\\n".encode())
    def kill(self, arguments): os.kill(os.getpid(), signal.SIGKILL)
queue = StartWorkers(2, A())
for number in range(100):
    if number == 50: queue.put({"target": "kill", "max_crashes": 2, "backoff": {"base": 0.01, "cap": 0.01}})
    queue.put({"target": "show", "arguments": number})
queue.join()
print("joined", flush=True)
queue.close()
"""
    out, err = run(tmp_path, source)
    *numbers, last = out.split()
    assert sorted(map(int, numbers)) == list(range(100))
    assert last == "joined"
    assert err.count("is gone (killed") == 2
    assert "given up" in err


def test_an_exception_is_shown_and_ends_nothing(tmp_path: Path) -> None:
    """Type, message and the author's own traceback on stderr; the next job runs."""
    source = """
from workerd import StartWorkers
class A:
    def fail(self, arguments): raise ValueError("no such customer")
    def show(self, arguments): print(arguments)
with StartWorkers(1, A()) as queue:
    queue.put({"target": "fail"})
    queue.put({"target": "show", "arguments": "still here"})
"""
    out, err = run(tmp_path, source)
    assert out == "still here\n"
    assert "ValueError: no such customer" in err
    assert "program.py" in err


def test_a_program_may_fork_and_may_have_no_output(tmp_path: Path) -> None:
    """A forked child of the program ends quietly and leaves the queue to its parent; closed stdout and stderr are borne."""
    source = """
import os, sys
from workerd import StartWorkers
class A:
    def write(self, arguments): open(arguments, "w").write("ran")
os.close(1); os.close(2)
sys.stdout = sys.stderr = None
queue = StartWorkers(1, A())
if os.fork() == 0:
    sys.exit(0)
os.wait()
queue.put({"target": "write", "arguments": "file"})
"""
    assert run(tmp_path, source) == ("", "")
    assert (tmp_path / "file").read_text() == "ran"


def test_a_class_that_cannot_be_made_ends_the_wait(tmp_path: Path) -> None:
    """The program ends and says why nothing was run."""
    source = """
from workerd import StartWorkers
class A:
    def __init__(self): raise RuntimeError("no database")
    def x(self, arguments): pass
StartWorkers(1, A).put({"target": "x"})
"""
    assert "RuntimeError: no database" in run(tmp_path, source)[1]


def test_what_is_no_job_is_refused_at_once() -> None:
    """A wrong type, target, option or number of workers raises where it is made, naming what was received."""

    class Attributes:
        def work(self, arguments: object) -> None: ...

    with pytest.raises(ValueError, match="-1"):
        StartWorkers(-1, Attributes())
    with pytest.raises(TypeError, match="no public method"):
        StartWorkers(1, object())
    with StartWorkers(1, Attributes()) as queue:
        with pytest.raises(ValueError, match=r"'play'.*work"):
            queue.put({"target": "play"})
        with pytest.raises(ValueError, match="timeout"):
            queue.put({"target": "work", "timeout": "soon"})
        with pytest.raises(TypeError, match="True"):
            queue.put(True)
        with pytest.raises(TypeError, match="cannot pickle"):
            queue.put({"target": "work", "arguments": threading.Lock()})
