"""Workers under supervision: what they die of, what is charged for it, timeouts, recycling, reload."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, Process, job, wait_until

from workerd import generation, worker
from workerd.claims import Claims
from workerd.forkserver import ForkServer, make_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = """
import ctypes, faulthandler, logging, multiprocessing, os, signal, subprocess, sys, threading, time
from pathlib import Path
import workerd

class Targets:
    def pid(self, arguments): return os.getpid()
    def noop(self, arguments): pass
    def sleep(self, arguments): time.sleep(arguments)
    def mark(self, arguments):
        with open(arguments, "a") as file: file.write("x")
    def mark_then_sleep(self, arguments):
        self.mark(arguments)
        time.sleep(600)
    def segfault(self, arguments): faulthandler._sigsegv()
    def exit(self, arguments): os._exit(arguments)
    def kill(self, arguments): os.kill(os.getpid(), signal.SIGKILL)
    def raise_(self, arguments): raise {"exit": SystemExit, "interrupt": KeyboardInterrupt, "base": BaseException}[arguments]("x")
    def c_call(self, arguments): ctypes.PyDLL(None).sleep(600)   # keeps the interpreter's lock all the while
    def stubborn(self, arguments):
        while True:
            try: time.sleep(600)
            except workerd.JobTimeout: pass
    def tidy(self, arguments):
        try: time.sleep(600)
        except workerd.JobTimeout:
            Path(arguments).write_text("tidied")
            raise
    def grandchild(self, arguments):
        child = subprocess.Popen(["sleep", "600"])
        Path(arguments).write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    def nothing_for_json(self, arguments): return threading.Lock()
    def write(self, arguments):
        print("printed by a job")
        print("no newline", end="", file=sys.stderr)
        logging.getLogger("theirs").warning("logged by a job")
        os.write(1, b"written by a job\\n")
        subprocess.run(["echo", "echoed by its child"])
        time.sleep(0.2)
    def fork(self, arguments):
        if os.fork() == 0:
            if arguments == "exit": sys.exit(0)
            return "child"
        return "parent"
    def garbage(self, arguments):
        for fd in range(3, 100):
            try: kind = os.readlink(f"/proc/self/fd/{fd}")
            except OSError: continue
            if kind.startswith("socket:"): os.write(fd, bytes(arguments))
        raise ValueError("after it")
    def family(self, arguments):
        def talk():
            for _ in range(50): print("x" * 16000)
        children = [multiprocessing.get_context("fork").Process(target=talk) for _ in range(3)]
        for child in children: child.start()
        talk()
        for child in children: child.join()
        return "done"
    def step(self, arguments):
        path, what = arguments
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep": time.sleep(600)
        self.mark(path)
        return what
    def grow(self, arguments): self.ballast = bytearray(arguments)
"""


def parent(pid: int) -> int:
    """The pid of a worker's fork server, or of a fork server's daemon."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("supervision"), SOURCE) as running:
        yield running


@pytest.mark.parametrize(("target", "arguments"), [("segfault", None), ("exit", 0), ("exit", 3), ("kill", None)])
def test_a_job_that_kills_its_workers_is_buried_and_nothing_else_suffers(
    daemon: Daemon, target: str, arguments: object
) -> None:
    """A segfault, a SIGKILL, an exit, also with status 0, costs the job a crash: after max_crashes it is dead,
    kept with the reason. Jobs around it run exactly once and are charged nothing.
    """
    with daemon.connect() as client:
        others = [job("pid", reply="result") for _ in range(20)]
        poison = job(target, arguments, reply="result", max_crashes=2, backoff={"base": 0.01, "cap": 0.01})
        client.send(poison)
        for other in others:
            client.send(other)
        lines = [client.recv() for _ in range(2 * len(others) + 2)]
    ended = [line for line in lines if line["status"] != "accepted"]
    dead = [line for line in ended if line["status"] == "dead"]
    assert [(line["error"]["reason"], line["crashes"], line["attempts"]) for line in dead] == [("crashed", 2, 0)]
    assert all(line["attempts"] == 1 for line in ended if line["status"] == "succeeded")
    assert len(ended) == len(others) + 1
    listed = daemon.request({"command": "dead", "id": dead[0]["id"]})["result"]["jobs"]
    assert listed[0]["error"]["reason"] == "crashed"
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2, "two workers again")


def quick_steps(daemon: Daemon, path: Path, special: str) -> list[dict[str, object]]:
    """Jobs that the daemon knows to be quick, so that they travel together, with one in the middle that is not so."""
    for _ in range(3):
        with daemon.connect() as client:
            client.pipeline([job("step", [str(path) + "-before", "warm"])] * 100)
        daemon.wait_until_done()
    return [job("step", [str(path), special if n == 20 else n], reply="result", max_crashes=1) for n in range(40)]


def test_results_outlive_the_worker_that_is_killed_before_it_sent_them(tmp_path: Path) -> None:
    """Results travel by the batch. One of the jobs kills the worker: each of the others runs once, and its result
    arrives once.
    """
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.send(quick_steps(daemon, tmp_path / "marks", "kill"))
        assert len(client.recv()) == 40
        lines = [client.recv() for _ in range(40)]
        assert [line["result"] for line in lines if line["status"] == "succeeded"] == [n for n in range(40) if n != 20]
        assert [line["crashes"] for line in lines if line["status"] == "dead"] == [1]
        assert (tmp_path / "marks").read_text() == "x" * 39


def test_results_do_not_wait_for_a_slow_job_behind_them(tmp_path: Path) -> None:
    """What has returned is told while the job after it takes its time, although the batch is not over."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.send(quick_steps(daemon, tmp_path / "marks", "sleep"))
        assert len(client.recv()) == 40
        assert [client.recv()["result"] for _ in range(20)] == list(range(20))
        assert daemon.status()["jobs"]["running"] == 1


def test_results_do_not_wait_for_a_slow_job_while_the_daemon_stops(tmp_path: Path) -> None:
    """A drain waits for the slow job; who wanted the results of those before it has them at once."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1, "drain_timeout": 600}) as daemon, daemon.connect() as client:
        jobs = quick_steps(daemon, tmp_path / "marks", "sleep")[:21]  # the slow one is the last
        client.send(jobs)
        assert len(client.recv()) == 21
        wait_until(lambda: (tmp_path / "marks").exists() and (tmp_path / "marks").stat().st_size == 20)
        daemon.kill(signal.SIGTERM)
        assert [client.recv()["result"] for _ in range(20)] == list(range(20))


@pytest.mark.parametrize("kind", ["exit", "interrupt", "base"])
def test_no_exception_ends_a_worker(daemon: Daemon, kind: str) -> None:
    """SystemExit, KeyboardInterrupt and any BaseException fail the job; the worker's process lives on."""
    before = {process.pid for process in daemon.workers()}
    line = daemon.run("raise_", kind)
    assert (line["status"], line["error"]["reason"]) == ("dead", "failed")
    assert "in raise_" in line["error"]["traceback"]
    assert "worker.py" not in line["error"]["traceback"], "workerd's own frames are of no use to the author"
    assert {process.pid for process in daemon.workers()} == before


def test_a_result_that_json_cannot_hold_is_final(daemon: Daemon) -> None:
    """The work is done, so it is not repeated whatever max_attempts says; the error names the type."""
    line = daemon.run("nothing_for_json", max_attempts=5)
    assert (line["status"], line["attempts"]) == ("dead", 1)
    assert "lock" in line["error"]["message"]


def test_a_job_out_of_time_gets_the_exception_and_may_tidy_up(daemon: Daemon, tmp_path: Path) -> None:
    """JobTimeout is raised inside the method first; the worker survives it."""
    before = {process.pid for process in daemon.workers()}
    line = daemon.run("tidy", str(tmp_path / "file"), timeout=0.1)
    assert (line["error"]["reason"], line["error"]["type"]) == ("timed_out", "workerd.JobTimeout")
    assert (tmp_path / "file").read_text() == "tidied"
    assert {process.pid for process in daemon.workers()} == before


@pytest.mark.parametrize("target", ["c_call", "stubborn"])
def test_a_job_that_ignores_its_timeout_is_killed_with_its_worker(daemon: Daemon, target: str) -> None:
    """Also inside a C call, and also one that swallows the exception; it is an attempt, not a crash."""
    line = daemon.run(target, timeout=0.1)
    assert (line["status"], line["error"]["reason"]) == ("dead", "timed_out")
    assert (line["attempts"], line["crashes"]) == (1, 0)
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2, "two workers again")


def test_a_timeout_spares_the_jobs_that_follow(daemon: Daemon) -> None:
    """Many short jobs with a timeout, in batches, one of which is too slow: only that one is interrupted."""
    with daemon.connect() as client:
        requests = [job("noop", reply="result", timeout=5.0) for _ in range(500)]
        requests[250] = job("sleep", 600, reply="result", timeout=0.2)
        for request in requests:
            client.send(request)
        lines = [client.recv() for _ in range(2 * len(requests))]
    ended = [line["status"] for line in lines if line["status"] != "accepted"]
    assert (ended.count("succeeded"), ended.count("dead")) == (499, 1)


def test_children_of_a_killed_worker_go_with_it(daemon: Daemon, tmp_path: Path) -> None:
    """A worker's whole process group is collected."""
    daemon.run("grandchild", str(tmp_path / "pid"), max_crashes=1)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


def test_a_failed_job_is_tried_again_only_if_asked(daemon: Daemon, tmp_path: Path) -> None:
    """max_attempts is 1 by default; with 3, three runs, and the second line says so."""
    line = daemon.run("raise_", "base")
    assert line["attempts"] == 1
    line = daemon.run("raise_", "base", max_attempts=3, backoff={"base": 0.01, "cap": 0.02})
    assert (line["status"], line["attempts"], line["crashes"]) == ("dead", 3, 0)


def test_what_jobs_write_is_in_the_log_with_worker_and_job(daemon: Daemon) -> None:
    """print, stderr without a newline, logging, raw writes and child processes: each a line that names the job."""
    job_id = daemon.run("write", id="a-job-that-writes")["id"]
    for text in ("printed by a job", "no newline", "logged by a job", "written by a job", "echoed by its child"):
        daemon.wait_for_log(text)
        line = next(line for line in daemon.log.splitlines() if text in line)
        assert f"job={job_id}" in line, line
        assert "target=write" in line, line
        assert "worker=" in line, line


def test_quick_jobs_do_not_wait_behind_a_slow_one(daemon: Daemon) -> None:
    """A slow job in a target that used to be quick: what was given to its worker with it is taken back and run by
    the idle worker, while the slow one is still running.
    """
    with daemon.connect() as client:
        assert all(reply["status"] == "accepted" for reply in client.pipeline([job("sleep", 0) for _ in range(300)]))
        daemon.wait_until_done()
        requests = [job("sleep", 0, reply="result") for _ in range(300)]
        requests[10] = job("sleep", 600, reply="result", id="slow", timeout=20)
        client.send(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
        lines = [client.recv() for _ in range(2 * len(requests) - 1)]
        ended = [line for line in lines if line["status"] != "accepted"]
        assert len(ended) == 299
        assert all(line["status"] == "succeeded" for line in ended)
        running = [process["job"] for process in daemon.status()["processes"] if process["job"]]
        assert running == ["slow"]
    daemon.wait_until_done()


def test_what_has_ended_is_settled_while_a_slow_job_runs(tmp_path: Path) -> None:
    """Quick jobs that were given to the worker together with a slow one count as done while that one runs."""
    ledger = tmp_path / "ledger"
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        with daemon.connect() as client:
            client.pipeline([job("mark", str(ledger)), job("sleep", 0)])
            daemon.wait_until_done()
            requests = [job("mark", str(ledger)) for _ in range(60)]
            requests[30] = job("sleep", 600)
            client.batch(requests)
        daemon.wait_until(lambda status: status["targets"]["mark"]["succeeded"] == 31, "30 and the first")
        daemon.wait_until(lambda status: status["jobs"]["ready"] == 29)
        assert ledger.stat().st_size == 31


def test_a_killed_fork_server_is_replaced_with_its_workers(daemon: Daemon) -> None:
    """SIGKILL of the fork server takes its workers with it; all are started anew, and jobs run."""
    workers = daemon.workers()
    parents = {parent(process.pid) for process in workers}
    assert len(parents) == 1
    os.kill(parents.pop(), signal.SIGKILL)
    wait_until(lambda: not any(process.alive for process in workers), "the old workers are gone")
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2, "two workers again")
    assert daemon.run("pid")["status"] == "succeeded"


def test_a_stopped_fork_server_is_replaced_when_it_is_missed(tmp_path: Path) -> None:
    """SIGSTOP of the fork server, then SIGKILL of a worker, of which nobody tells: after a while both are replaced, and
    every job runs, also the one that the dead worker had.
    """
    source = """
import os, time
class Targets:
    def echo(self, arguments): return arguments
    def wait_for(self, path):
        while not os.path.exists(path): time.sleep(0.01)
"""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, source, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.request(job("wait_for", str(gate), reply="result", backoff={"base": 0, "cap": 0}))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        (worker,) = daemon.workers()
        (server,) = (process for process in daemon.descendants() if process.pid != worker.pid)
        server.kill(signal.SIGSTOP)
        worker.kill()
        client.send(job("echo", 1, reply="result"))
        assert client.recv()["status"] == "accepted"
        gate.touch()
        ended = [client.recv(), client.recv()]
        assert [reply["status"] for reply in ended] == ["succeeded"] * 2
        assert not server.alive
        assert "has not told of the end of worker 0 for 10 s" in daemon.log


@pytest.mark.parametrize(
    "garbage",
    [[255, 255, 255, 252], [0, 0, 0, 1, 193], [127, 255, 255, 255]],
    ids=["negative", "no message", "endless"],
)
def test_garbage_on_a_workers_pipe_costs_that_worker_only(daemon: Daemon, garbage: list[int]) -> None:
    """A job that writes into workerd's own descriptors: its worker is replaced, the job is charged a crash each time
    and never taken for a success, and the daemon serves on.
    """
    line = daemon.run("garbage", garbage, max_crashes=2, backoff={"base": 0.01, "cap": 0.01})
    assert (line["status"], line["error"]["reason"], line["crashes"]) == ("dead", "crashed", 2)
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2)
    assert daemon.run("pid")["status"] == "succeeded"


def test_children_that_a_job_forks_may_print(daemon: Daemon) -> None:
    """Multiprocessing in a job, parent and children printing long lines at once: all of it is output, no protocol."""
    assert daemon.run("family")["result"] == "done"
    daemon.wait_for_log("x" * 1000)
    assert "makes no sense" not in daemon.log.replace("\n", "").rpartition("family")[2]


def test_no_descriptors_left_is_borne(tmp_path: Path) -> None:
    """Worker and fork server die while the daemon has no descriptor to spare: both are replaced once it has."""
    with Daemon(tmp_path, "import os\nclass T:\n    def pid(self, a): return os.getpid()\n") as daemon:
        hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
        for kind in ("worker", "fork server"):
            victim = daemon.workers()[0].pid
            if kind == "fork server":
                victim = parent(victim)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (6, hard))
            os.kill(victim, signal.SIGKILL)
            daemon.wait_for_log("cannot be started" if kind == "worker" else "the workers cannot be started again")
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (1024, hard))
            daemon.wait_until(lambda status: status["workers"]["idle"] == 2, kind)
        assert daemon.run("pid")["status"] == "succeeded"


def test_a_fork_server_without_descriptors_keeps_its_workers(tmp_path: Path) -> None:
    """It cannot take what a new worker needs, and says so: a job that runs goes on, and with descriptors both are back."""
    with Daemon(tmp_path, SOURCE) as daemon, daemon.connect() as client:
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        client.request(job("mark", str(gate), max_crashes=1, reply="result"))  # runs until somebody reads
        status = daemon.wait_until(lambda status: status["jobs"]["running"] == 1, "it runs")
        (idle,) = (process["pid"] for process in status["processes"] if process["state"] == "idle")
        server = parent(idle)
        limits = resource.prlimit(server, resource.RLIMIT_NOFILE)
        resource.prlimit(server, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(idle, signal.SIGKILL)
        daemon.wait_for_log("cannot be started: the fork server has no room for it: Too many open files")
        resource.prlimit(server, resource.RLIMIT_NOFILE, limits)
        daemon.wait_until(lambda status: status["workers"]["idle"] == 1, "it is replaced")
        assert gate.read_text() == "x"
        assert client.recv()["status"] == "succeeded"
        assert Process.of(server) is not None
        assert "Traceback" not in daemon.log


def test_a_fork_server_that_nobody_waits_for_any_more_ends_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The daemon gives up while the class is imported: the fork server has nobody to tell, and prints nothing."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "slow.py").write_text(
        f"open({str(fifo)!r}).read()\nclass T:\n    def echo(self, value): return value\n"
    )
    claims = Claims.open(None)
    server = ForkServer.start(make_spec("slow:T", [tmp_path], worker.Settings()), claims.fd)
    with fifo.open("w"):  # it imports the module by now
        server.socket.close()
    assert server.process is not None
    assert server.process.wait(60) == 0
    assert capfd.readouterr() == ("", "")


def test_descriptions_that_are_too_long_or_cannot_be_shown(tmp_path: Path) -> None:
    """Half a megabyte of docstrings, lone surrogates in them, a default whose repr raises: the class is usable."""
    source = """
class Odd:
    def __repr__(self): raise RuntimeError
class T:
    def odd(self, arguments=Odd()): return 1
    def surrogate(self, arguments): ...
    surrogate.__doc__ = chr(0xD800)
    def long(self, arguments): ...
    long.__doc__ = "x" * 500_000
"""
    with Daemon(tmp_path, source) as daemon:
        assert {target["name"] for target in daemon.request({"command": "targets"})["result"]["targets"]} == {
            *("odd", "surrogate", "long"),
        }
        assert daemon.run("odd")["result"] == 1


@pytest.mark.parametrize("how", ["return", "exit"])
def test_a_job_may_fork(daemon: Daemon, how: str) -> None:
    """A child of the job's own that comes back from the method ends there: it is no second worker on the pipe."""
    lines = [daemon.run("fork", how) for _ in range(20)]
    assert [(line["status"], line.get("result")) for line in lines] == [("succeeded", "parent")] * 20
    assert daemon.run("pid")["status"] == "succeeded"
    assert "defect" not in daemon.log


def test_a_stopped_worker_does_not_keep_what_it_has_not_begun(daemon: Daemon) -> None:
    """SIGSTOP of a worker: jobs go to the other one, also those that the stopped one had been given."""
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2)
    stopped = daemon.workers()[0]
    stopped.kill(signal.SIGSTOP)
    try:
        with daemon.connect() as client:
            for _ in range(40):
                client.send(job("pid", reply="result"))
            ended = [line for _ in range(80) if (line := client.recv())["status"] != "accepted"]
        assert len(ended) == 40
        assert stopped.pid not in {line["result"] for line in ended}
    finally:
        stopped.kill(signal.SIGCONT)
    daemon.wait_until(lambda status: status["workers"]["idle"] == 2)


def test_a_fork_server_that_dies_while_it_imports_is_tried_again(tmp_path: Path) -> None:
    """The class's module is broken when the fork server has to be started anew: the daemon says so, goes on trying,
    and works again once the module is mended.
    """
    source = "import os\nclass T:\n    def pid(self, a): return os.getpid()\n"
    with Daemon(tmp_path, source) as daemon:
        server = parent(daemon.workers()[0].pid)
        daemon.write_attributes("import os\nos.kill(os.getpid(), 9)\nclass T:\n    def pid(self, a): pass\n")
        os.kill(server, signal.SIGKILL)
        daemon.wait_for_log("the workers cannot be started again")
        assert daemon.request(job("pid"))["status"] == "accepted"
        daemon.write_attributes(source)
        daemon.wait_until(lambda status: status["workers"]["idle"] == 2 and status["jobs"]["ready"] == 0)


def test_more_workers_than_a_fork_server_can_be_asked_for_at_once(tmp_path: Path) -> None:
    """400 workers: they are started some at a time, READY comes when all are there, and each runs jobs."""
    with Daemon(tmp_path, "class T:\n    def x(self, a): return a\n", workers={"count": 400}) as daemon:
        assert daemon.status()["workers"]["idle"] == 400
        assert daemon.run("x", 1)["result"] == 1


def test_recycling_by_jobs_and_by_memory(tmp_path: Path) -> None:
    """max_jobs: no worker runs more. max_memory: one that has grown is replaced between jobs; no job is lost."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1, "max_jobs": 10, "max_memory": "256MiB"}) as daemon:
        with daemon.connect() as client:
            for _ in range(100):
                client.send(job("pid", reply="result"))
            lines = [client.recv() for _ in range(200)]
        pids = [line["result"] for line in lines if line["status"] == "succeeded"]
        assert len(pids) == 100
        assert all(pids.count(pid) <= 10 for pid in pids)
        daemon.wait_until(lambda status: status["workers"]["idle"] == 1, "a worker")
        before = daemon.run("pid")["result"]
        daemon.run("grow", 400 * 2**20)
        assert daemon.run("pid")["result"] != before
        name = 'workerd_worker_exits_total{reason="retired"}'
        wait_until(lambda: daemon.metrics()[name] >= 11, "all replaced are gone")


def test_false_retires_a_worker_until_the_next_reload(tmp_path: Path) -> None:
    """As in the seed library: one worker fewer, without harm to its job; a reload brings it back."""
    with Daemon(tmp_path, SOURCE) as daemon:
        assert daemon.request(False) == {"command": "retire", "result": {"wanted": 1}}
        daemon.wait_until(lambda status: len(status["processes"]) == 1, "one worker")
        daemon.reload()
        daemon.wait_until(lambda status: status["workers"]["idle"] == 2, "two workers")


def test_reload_brings_new_code_and_new_settings_without_losing_a_job(tmp_path: Path) -> None:
    """New workers are ready before the old retire; a job that runs meanwhile ends in the old code."""
    old = "import time\nclass T:\n    def version(self, a):\n        time.sleep(a)\n        return 1\n"
    with Daemon(tmp_path, old) as daemon, daemon.connect() as client:
        client.request(job("version", 1.5, reply="result"))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        daemon.write_attributes(old.replace("return 1", "return 2") + "    def added(self, a): return 'new'\n")
        daemon.configure(workers={"count": 3}, targets={})
        daemon.reload()
        assert daemon.run("version", 0)["result"] == 2
        assert daemon.run("added")["result"] == "new"
        assert client.recv()["result"] == 1
        daemon.wait_until(lambda s: s["workers"]["idle"] == 3 and len(s["processes"]) == 3, "the old are gone")
        assert daemon.metrics()["workerd_config_last_reload_successful"] == 1


def test_what_waits_for_a_restart_is_told_as_it_is(tmp_path: Path) -> None:
    """After a reload the status names the spool and the socket that are in use, and the log says each time that the
    new ones are not: whoever makes a backup looks there.
    """
    with Daemon(tmp_path, "class T:\n    def x(self, a): pass\n") as daemon:
        before, said = daemon.status(), "[spool] path has changed: restart for it to take effect"
        daemon.configure(spool={"path": str(tmp_path / "other.db")}, feeder={"socket": str(tmp_path / "other")})
        for times in (1, 2):
            daemon.reload()
            assert daemon.log.count(said) == times
        after = daemon.status()
        assert (after["spool"]["path"], after["socket"]) == (before["spool"]["path"], before["socket"])
        daemon.configure(spool={"path": before["spool"]["path"]})
        daemon.reload()
        assert daemon.log.count(said) == 2


@pytest.mark.parametrize("fault", ["toml", "import", "class", "init"])
def test_a_bad_reload_keeps_the_old_and_says_so(tmp_path: Path, fault: str) -> None:
    """Whatever is wrong with the new configuration or code, the old goes on, and STATUS, log and metric tell."""
    with Daemon(tmp_path, "class T:\n    def version(self, a): return 1\n") as daemon:
        before = {process.pid for process in daemon.workers()}
        if fault == "toml":
            daemon.config_file.write_text("[workers\n")
        elif fault == "import":
            (tmp_path / "attributes.py").write_text("import no_such_module\n")
        elif fault == "class":
            (tmp_path / "attributes.py").write_text("class Other:\n    def x(self, a): pass\n")
        else:
            text = (
                "class T:\n    def __init__(self): raise RuntimeError('no database')\n    def version(self, a): pass\n"
            )
            (tmp_path / "attributes.py").write_text(text)
        ready = daemon.reload()
        assert "reload failed" in ready["STATUS"]
        assert daemon.run("version")["result"] == 1
        assert daemon.metrics()["workerd_config_last_reload_successful"] == 0
        assert "reload failed" in daemon.log
        daemon.wait_until(lambda status: status["workers"]["idle"] == 2 and len(status["processes"]) == 2)
        assert {process.pid for process in daemon.workers()} == before


def test_a_class_that_cannot_be_made_does_not_start(tmp_path: Path) -> None:
    """READY is not sent before every worker is ready; when none can be, the daemon says why and exits with 70."""
    source = "class T:\n    def __init__(self): raise RuntimeError('no database')\n    def x(self, a): pass\n"
    with Daemon(tmp_path, source, start=False) as daemon:
        daemon.start(wait=False)
        assert daemon.wait() == 70
        assert not daemon.notifications.has("READY")
        assert "RuntimeError: no database" in daemon.log


def test_20000_jobs_while_workers_are_killed(tmp_path: Path) -> None:
    """A worker is killed every 50 ms under a load of 20,000 jobs: every job ran, and only charged ones more than once."""
    source = """
import os
class T:
    def record(self, arguments):
        fd = os.open(arguments[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"%d\\n" % arguments[1])
        os.close(fd)
"""
    ledger = tmp_path / "ledger"
    with Daemon(tmp_path, source, jobs={"max_crashes": 50, "backoff": {"base": 0.01, "cap": 0.01}}) as daemon:
        stop = threading.Event()
        kills = 0

        def killer() -> None:
            nonlocal kills
            turn = 0
            while not stop.wait(0.05):
                workers = daemon.workers()
                if workers:
                    workers[turn % len(workers)].kill()
                    kills += 1
                turn += 1

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            with daemon.connect() as client:
                replies = client.pipeline(job("record", [str(ledger), number]) for number in range(20_000))
            assert all(reply["status"] == "accepted" for reply in replies)
            daemon.wait_until_done()
        finally:
            stop.set()
            thread.join()
        ran = [int(line) for line in ledger.read_text().split()]
        assert set(ran) == set(range(20_000))
        assert kills > 0
        charged = sum('"event": "crash"' in line or "crashed its worker" in line for line in daemon.log.splitlines())
        assert len(ran) - 20_000 <= charged <= kills
        assert daemon.status()["jobs"]["dead"] == 0


def test_that_no_descriptor_is_left_is_not_the_end_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork server is not killed, and all workers with it, because a worker could not be watched."""

    def none_left(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def wait() -> None:
        await asyncio.wait_for(generation.ended(os.getppid()), 0.5)

    monkeypatch.setattr(os, "pidfd_open", none_left)
    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_a_fork_server_that_stops_before_a_fork_is_replaced(tmp_path: Path) -> None:
    """Stuck with a request for a worker, not with the end of one: jobs run again all the same."""
    flag = tmp_path / "flag"
    source = f"""
import os, signal
def stop():
    if os.path.exists({str(flag)!r}):
        os.unlink({str(flag)!r})
        os.kill(os.getpid(), signal.SIGSTOP)
os.register_at_fork(before=stop)
class Attributes:
    def echo(self, value): return value
"""
    with Daemon(tmp_path, source, workers={"count": 1}) as daemon:
        flag.touch()
        daemon.workers()[0].kill()
        assert daemon.run("echo", 1)["status"] == "succeeded"
