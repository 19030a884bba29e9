"""Starts and reloads that hang, or that are asked for while one is under way; and SIGHUP at any moment of a start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_process import ROOT, Daemon, Process, wait_until

if TYPE_CHECKING:
    from daemon_process import Notifications

LIMIT = 8  # seconds that a start may take: more than it does on a slow machine, less than the fork server is waited for
GOOD = "class T:\n    def version(self, a): return 1\n"
# Each says that it hangs, and waits for a gate to open.
WAIT = """
import os, threading, time
def wait():
    open({folder!r} + "/hangs", "w").close()
    while not os.path.exists({folder!r} + "/gate"): time.sleep(0.01)
"""
CLASS = "class T:\n    def version(self, a): return 2\n"
HANGS = {
    "import": "wait()\n" + CLASS,
    "instance": CLASS + "    def __init__(self): wait()\n",
    # a lock that a thread had when the worker was forked is never given back in the worker
    "lock": "lock = threading.Lock()\nthreading.Thread(target=lambda: lock.acquire() and time.sleep(600)).start()\n"
    "while not lock.locked(): time.sleep(0.01)\n" + CLASS + "    def __init__(self):\n"
    "        open({folder!r} + '/hangs', 'w').close()\n        lock.acquire()\n",
    "child": "os.register_at_fork(after_in_child=wait)\n" + CLASS,
    "fork": "os.register_at_fork(before=wait)\n" + CLASS,
}


def hang(folder: Path, where: str) -> str:
    return (WAIT + HANGS[where]).format(folder=str(folder))


def hangs(folder: Path) -> None:
    """Wait until it does."""
    wait_until((folder / "hangs").exists, "the class hangs")


def left(daemon: Daemon) -> list[Process]:
    """What came of the daemon and is neither a worker that it knows nor their fork server."""
    workers = daemon.workers()
    servers = {int(Path(f"/proc/{w.pid}/stat").read_text().rpartition(")")[2].split()[1]) for w in workers}
    return [p for p in daemon.descendants() if p not in workers and p.pid not in servers]


@pytest.mark.parametrize("where", HANGS)
def test_a_newer_reload_takes_the_place_of_one_that_hangs(tmp_path: Path, where: str) -> None:
    """Wherever the class hangs, the next SIGHUP ends that reload with its processes, and is done."""
    with Daemon(tmp_path, GOOD) as daemon:
        daemon.write_attributes(hang(tmp_path, where))
        daemon.kill(signal.SIGHUP)
        hangs(tmp_path)
        assert daemon.run("version")["result"] == 1
        daemon.write_attributes(GOOD.replace("1", "3"))
        daemon.reload()
        daemon.wait_until(lambda status: status["state"] == "running")
        assert daemon.run("version")["result"] == 3
        assert "the one under way is given up" in daemon.log
        assert daemon.metrics()["workerd_config_last_reload_successful"] == 1
        wait_until(lambda: not left(daemon), "nothing is left of what hung")
        daemon.wait_until(lambda status: status["workers"]["idle"] == 2 and len(status["processes"]) == 2)
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("where", HANGS)
def test_a_reload_that_hangs_fails_in_the_end(tmp_path: Path, where: str) -> None:
    """After start_timeout the step is given up, and told; all stays as it was, and no process is left."""
    with Daemon(tmp_path, GOOD) as daemon:
        before = {worker.pid for worker in daemon.workers()}
        daemon.write_attributes(hang(tmp_path, where))
        daemon.configure(workers={"start_timeout": LIMIT})
        ready = daemon.reload()
        assert f"(reload failed: {LIMIT} s were not enough for " in ready["STATUS"]
        step = {"import": "to import the class", "fork": "to fork worker"}.get(where, "to make its instance")
        assert step in ready["STATUS"]
        assert (
            f"reload failed, all stays as it was: {LIMIT} s were not enough for {'process' if where == 'import' else ''}"
            in (daemon.log)
        )
        assert daemon.run("version")["result"] == 1
        wait_until(lambda: not left(daemon), "nothing is left of what hung")
        daemon.wait_until(lambda status: status["workers"]["idle"] == 2 and len(status["processes"]) == 2)
        assert {worker.pid for worker in daemon.workers()} == before
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("where", HANGS)
def test_a_start_that_hangs_fails_in_the_end(tmp_path: Path, where: str) -> None:
    """After start_timeout the daemon ends with status 70, says why, and leaves no process."""
    with Daemon(tmp_path, hang(tmp_path, where), start=False, workers={"start_timeout": LIMIT}) as daemon:
        daemon.start(wait=False)
        assert daemon.wait() == 70
        assert not daemon.notifications.has("READY")
        last = daemon.log.splitlines()[-1]
        assert last.startswith(f"workerd: {LIMIT} s were not enough for ")
        assert last.endswith("; mend the class, or raise [workers] start_timeout")
        wait_until(lambda: not daemon.descendants(), "no process is left")


@pytest.mark.parametrize("where", HANGS)
@pytest.mark.parametrize("when", ["start", "reload"])
def test_a_stop_ends_what_hangs(tmp_path: Path, where: str, when: str) -> None:
    """SIGTERM during a start or a reload that hangs: exit status 0, and no process is left."""
    with Daemon(tmp_path, GOOD if when == "reload" else hang(tmp_path, where), start=False) as daemon:
        daemon.start(wait=when == "reload")
        if when == "reload":
            daemon.write_attributes(hang(tmp_path, where))
            daemon.kill(signal.SIGHUP)
        hangs(tmp_path)
        assert daemon.stop() == 0
        wait_until(lambda: not daemon.descendants(), "no process is left")


@pytest.mark.parametrize(("where", "what"), [("import", "to import the class"), ("instance", "to make its instance")])
def test_what_is_waited_for_is_told(tmp_path: Path, where: str, what: str) -> None:
    """A start that takes long says in the log and in STATUS which step it waits for; then it is ready all the same."""
    with Daemon(tmp_path, hang(tmp_path, where), start=False) as daemon:
        daemon.start(wait=False)
        daemon.wait_for_log("waiting for 10 s already for ")
        line = next(line for line in daemon.log.splitlines() if "waiting for" in line)
        assert what in line
        assert "given up after 300 s ([workers] start_timeout): if it hangs, mend the class" in line
        told = daemon.notifications.wait_for(lambda m: "waiting for" in m.get("STATUS", ""))
        assert what in told["STATUS"]
        assert daemon.notifications.has("EXTEND_TIMEOUT_USEC")
        (tmp_path / "gate").touch()
        ready = daemon.notifications.wait_for(lambda m: m.get("READY") == "1")
        assert "waiting" not in ready["STATUS"]
        assert daemon.run("version")["result"] == 2


def test_a_reload_asks_for_time(tmp_path: Path) -> None:
    """Between RELOADING and READY systemd is asked for more time, now and again, so that a slow reload is not late."""
    with Daemon(tmp_path, GOOD) as daemon:
        since = len(daemon.notifications.messages)
        daemon.write_attributes(hang(tmp_path, "import"))
        daemon.kill(signal.SIGHUP)

        def pleas(notifications: Notifications) -> int:
            return sum("EXTEND_TIMEOUT_USEC" in message for message in notifications.messages[since:])

        wait_until(lambda: pleas(daemon.notifications) >= 2, "a second plea")
        (tmp_path / "gate").touch()
        daemon.notifications.wait_for(lambda m: m.get("READY") == "1", since=since)
        assert daemon.run("version")["result"] == 2


def test_a_worker_that_hangs_when_it_is_started_again(tmp_path: Path) -> None:
    """Later than at the start it is the same: it is killed after start_timeout, told, and tried again."""
    flag = tmp_path / "flag"
    source = (
        "import os, time\nclass T:\n    def __init__(self):\n"
        f"        while os.path.exists({str(flag)!r}): time.sleep(0.01)\n    def version(self, a): return 1\n"
    )
    with Daemon(tmp_path, source, workers={"count": 1, "start_timeout": LIMIT}) as daemon:
        flag.touch()
        daemon.workers()[0].kill()
        told = f"is killed, as it was not ready in time: {LIMIT} s were not enough for worker"
        wait_until(lambda: daemon.log.count(told) >= 2, "it is killed twice")
        assert daemon.metrics()['workerd_worker_exits_total{reason="start_failed"}'] >= 1
        flag.unlink()
        assert daemon.run("version")["result"] == 1
        assert not left(daemon)


# --- SIGHUP from the first moment -------------------------------------------------------------------------

# Python imports this first. While the daemon only notes a SIGHUP it gets one at each module that it imports, and when
# it opens its configuration.
HANGUPS = """
import os, signal, sys
def hang_up(where):
    if getattr(signal.getsignal(signal.SIGHUP), "__module__", "") == "workerd.early":
        with open({ledger!r}, "a") as ledger: ledger.write(where + "\\n")
        os.kill(os.getpid(), signal.SIGHUP)
class Importer:
    def find_spec(self, name, path=None, target=None): hang_up(name)
def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith("workerd.toml"): hang_up("configuration")
if "run" in sys.orig_argv:
    sys.meta_path.insert(0, Importer())
    sys.addaudithook(audit)
"""


def ignored(process: Process, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    masks = {name: int(value, 16) for name, _, value in (line.partition(":") for line in lines) if name == "SigIgn"}
    return bool(masks["SigIgn"] >> (number - 1) & 1)


@pytest.mark.parametrize("how", [[], ["--daemonize"]])
def test_hangups_while_the_daemon_starts(tmp_path: Path, how: list[str]) -> None:
    """A SIGHUP at the import of each of the daemon's modules, and when it reads its configuration: it becomes ready, and
    as the last came too late for what was read, it reloads. What it starts does not ignore SIGHUP.
    """
    ledger = tmp_path / "ledger"
    (tmp_path / "sitecustomize.py").write_text(HANGUPS.format(ledger=str(ledger)))
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Daemon(tmp_path, GOOD, environment=environment, start=False) as daemon:
        if how:
            logfile = ["--logfile", str(daemon.log_file)]
            done = daemon.command("run", "--daemonize", "--config", str(daemon.config_file), *logfile)
            assert (done.returncode, done.stderr) == (0, "")
        else:
            daemon.start()
        daemon.notifications.wait_for(lambda m: m.get("RELOADING") == "1")
        daemon.wait_for_log("reloaded: generation")
        assert {"workerd.cli", "workerd.daemon", "uvloop", "configuration"} <= set(ledger.read_text().split())
        assert daemon.run("version")["result"] == 1
        daemon.wait_until(lambda status: status["state"] == "running" and len(status["processes"]) == 2)
        pid = daemon.status()["pid"]
        assert not any(ignored(process, signal.SIGHUP) for process in daemon.descendants() if process.pid != pid)


def test_other_commands_end_with_their_terminal(tmp_path: Path) -> None:
    """Only the daemon outlives a SIGHUP: also a command that has the word `run` among its arguments does not."""
    with Daemon(tmp_path, "import time\nclass T:\n    def run(self, a): time.sleep(600)\n") as daemon:
        # whoever runs the tests may ignore it
        submit = ["workerd", "submit", "--socket", str(daemon.socket), "--wait", "run"]
        command = ["env", "--default-signal=HUP", sys.executable, "-m", *submit]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == -signal.SIGHUP


# --- workerd itself ---------------------------------------------------------------------------------------


def test_that_workerd_itself_is_missing_is_not_told_of_the_class(tmp_path: Path) -> None:
    """Between an upgrade's removal and its installation there is no package: a reload says so, and the workers come
    back when it does.
    """
    site = tmp_path / "site"
    shutil.copytree(ROOT / "workerd", site / "workerd", ignore=shutil.ignore_patterns("__pycache__"))
    # no other workerd may be found in its place
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "sys.path[:] = [p for p in sys.path if not __import__('os').path.isdir(p + '/workerd') or 'site' == p[-4:]]\n"
    )
    with Daemon(tmp_path, GOOD, environment={"PYTHONPATH": str(site)}) as daemon:
        (site / "workerd").rename(site / "away")
        ready = daemon.reload()
        assert "(reload failed: workerd itself cannot be imported: ModuleNotFoundError" in ready["STATUS"]
        server = int(Path(f"/proc/{daemon.workers()[0].pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        daemon.wait_for_log("the workers cannot be started again: workerd itself cannot be imported")
        assert "mend the module" not in daemon.log
        (site / "away").rename(site / "workerd")
        assert daemon.run("version")["result"] == 1
