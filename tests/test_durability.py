"""What survives: kill -9 of the daemon, orderly stops, restarts, and the promises made to clients about ids."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import pytest
from daemon_process import Daemon, Process, job, wait_until

SOURCE = """
import ctypes, os, time
class Targets:
    def noop(self, arguments): pass
    def record(self, arguments):
        fd = os.open(arguments[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"%d\\n" % arguments[1])
        os.close(fd)
    def block(self, arguments):
        self.record(arguments)
        ctypes.PyDLL(None).sleep(600)
    def wait_for(self, arguments):
        while not os.path.exists(arguments): time.sleep(0.01)
        return "seen"
"""


def numbers(ledger: Path) -> list[int]:
    return [int(line) for line in ledger.read_text().split()] if ledger.exists() else []


def test_kill_9_of_the_daemon_loses_no_acknowledged_job(tmp_path: Path) -> None:
    """1,000 acknowledged jobs behind two that block: SIGKILL of the daemon, its workers die with it although they are
    inside a C call; after a restart everything runs, and exactly the two interrupted jobs are charged a crash.
    """
    ledger, blocked = tmp_path / "ledger", tmp_path / "blocked"
    with Daemon(tmp_path, SOURCE) as daemon:
        with daemon.connect() as client:
            for number in range(2):
                client.request(job("block", [str(blocked), number], max_crashes=1, priority=0))
            daemon.wait_until(lambda status: status["jobs"]["running"] == 2)
            replies = client.pipeline(job("record", [str(ledger), number]) for number in range(1000))
            assert all(reply["status"] == "accepted" for reply in replies)
        workers = daemon.workers()
        daemon.kill(signal.SIGKILL)
        wait_until(lambda: not any(process.alive for process in workers), "the workers die with the daemon", 5)
        assert numbers(ledger) == []
        daemon.start()
        daemon.wait_until_done()
        assert sorted(numbers(ledger)) == list(range(1000)), "each ran, and none twice"
        assert sorted(numbers(blocked)) == [0, 1], "a job that used up its crashes is not run again"
        dead = daemon.request({"command": "dead"})["result"]["jobs"]
        assert [(entry["target"], entry["crashes"], entry["error"]["reason"]) for entry in dead] == [
            ("block", 1, "crashed"),
            ("block", 1, "crashed"),
        ]


def test_an_orderly_stop_charges_nothing_and_keeps_the_rest(tmp_path: Path) -> None:
    """SIGTERM with a drain timeout that is too short: the running job is stopped, uncharged, and runs again."""
    ledger = tmp_path / "ledger"
    with Daemon(tmp_path, SOURCE, workers={"count": 1, "drain_timeout": 0.2}) as daemon:
        with daemon.connect() as client:
            client.request(job("block", [str(ledger), 1], max_crashes=1, id="blocker"))
            client.request(job("record", [str(ledger), 2], priority=200))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        wait_until(lambda: numbers(ledger) == [1])
        assert daemon.stop() == 0
        assert daemon.notifications.has("STOPPING", "1")
        daemon.start()
        wait_until(lambda: numbers(ledger) == [1, 1], "the interrupted job runs again")
        status = daemon.status()
        assert (status["jobs"]["dead"], status["jobs"]["ready"]) == (0, 1)


def test_drain_lets_running_jobs_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    """SIGTERM: a running job ends well and its client hears of it; a new job is answered `draining`; exit 0."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        flag = tmp_path / "flag"
        with daemon.connect() as client, daemon.connect() as other:
            client.request(job("wait_for", str(flag), reply="result"))
            other.request({"command": "ping"})
            daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
            daemon.kill(signal.SIGTERM)
            daemon.notifications.wait_for(lambda message: "STOPPING" in message)
            assert other.request(job("noop", id="late"))["error"]["code"] == "draining"
            flag.touch()
            assert client.recv()["result"] == "seen"
        assert daemon.wait() == 0
        wait_until(lambda: not daemon.descendants(), "no process is left behind")
        assert not daemon.socket.exists()


def test_delayed_jobs_survive_and_wait_for_their_time(tmp_path: Path) -> None:
    """A delay counts from submission, over a restart."""
    ledger = tmp_path / "ledger"
    with Daemon(tmp_path, SOURCE) as daemon:
        with daemon.connect() as client:
            client.request(job("record", [str(ledger), 1], delay=3600))
            client.request(job("record", [str(ledger), 2], delay=1.0))
        assert daemon.status()["jobs"]["scheduled"] == 2
        daemon.kill(signal.SIGKILL)
        daemon.start()
        wait_until(lambda: numbers(ledger) == [2])
        assert daemon.status()["jobs"]["scheduled"] == 1


@pytest.mark.parametrize("path", ["spool.db", ""], ids=["durable", "in memory"])
def test_a_known_id_is_a_duplicate_and_is_not_run_again(tmp_path: Path, path: str) -> None:
    """While the job waits, runs, and after it has ended: `duplicate`; also twice in one chunk and in one batch."""
    ledger = tmp_path / "ledger"
    with Daemon(tmp_path, SOURCE, spool={"path": path and str(tmp_path / path)}) as daemon:
        with daemon.connect() as client:
            same = job("record", [str(ledger), 7], id="seven")
            assert [reply["status"] for reply in client.pipeline([same] * 5)] == ["accepted"] + ["duplicate"] * 4
            assert [reply["status"] for reply in client.batch([same, same])] == ["duplicate", "duplicate"]
            daemon.wait_until_done()
            assert client.request(same)["status"] == "duplicate"
            later = job("record", [str(ledger), 8], id="eight", delay=3600)
            assert client.request(later)["status"] == "accepted"
            assert client.request(later)["status"] == "duplicate"
        if path:
            daemon.kill(signal.SIGKILL)
            daemon.start()
            assert daemon.request(same)["status"] == "duplicate"
            assert daemon.request(later)["status"] == "duplicate"
        assert numbers(ledger) == [7]


def test_a_duplicate_is_only_told_where_there_is_such_a_job(tmp_path: Path) -> None:
    """Ids of the form that the daemon gives: that of a job that waits, is dead, or was dead and waits again, also after a
    kill -9, is a duplicate. One whose number went to a job with an id of its own, or to none, is refused, alone and in
    an array, of which nothing is run; after the next start it is an id like any other, and so runs once.
    """
    source = """
class T:
    def noop(self, a): pass
    def fail(self, a): raise ValueError(a)
"""
    with Daemon(tmp_path, source) as daemon, daemon.connect() as client:
        waits = client.request(job("noop", delay=3600))["id"]
        dead, again = (daemon.run("fail")["id"] for _ in range(2))
        assert client.request(job("noop", id="own"))["status"] == "accepted"
        prefix, _, number = again.rpartition("-")
        nobodys = f"{prefix}-{int(number, 16) + 1:x}"
        assert client.request({"command": "dead", "action": "retry", "id": again})["result"] == {"retried": 1}
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 2)
        for name in (waits, dead, again):
            assert client.request(job("noop", id=name)) == {"id": name, "status": "duplicate"}
        refused = client.request(job("noop", id=nobodys))
        assert (refused["id"], refused["error"]["code"]) == (nobodys, "bad_request")
        assert f'ids that begin with "{prefix}-" are' in refused["error"]["message"]
        assert nobodys in refused["error"]["message"]
        mixed = [
            job("noop", id=waits),
            job("noop", delay=3600),
            job("noop", id="new", delay=3600),
            job("nothing", id=dead),
        ]
        known, plain, new, missing = client.pipeline(mixed)
        assert (known["status"], plain["status"], new["status"]) == ("duplicate", "accepted", "accepted")
        assert missing["error"]["code"] == "unknown_target"
        array = [job("noop", id="newer", delay=3600), job("noop", id=waits), job("noop", id=nobodys)]
        error = client.batch(array)["error"]
        assert (error["code"], error["message"][:9]) == ("bad_request", "$[2].id: ")
        assert [reply["status"] for reply in client.batch(array[:2])] == ["accepted", "duplicate"]
        daemon.kill(signal.SIGKILL)
        daemon.start()
        for name in (waits, dead, again, "newer"):
            assert daemon.request(job("noop", id=name))["status"] == "duplicate"
        assert [daemon.request(job("noop", id=nobodys))["status"] for _ in range(2)] == ["accepted", "duplicate"]


def test_dead_jobs_stay_until_somebody_decides(tmp_path: Path) -> None:
    """Dead jobs survive a restart with their error; retry runs them under their old id; delete forgets them."""
    source = "from pathlib import Path\nclass T:\n    def need(self, a): return Path(a).read_text()\n"
    missing = tmp_path / "file"
    with Daemon(tmp_path, source) as daemon:
        ids = [daemon.run("need", str(missing))["id"] for _ in range(3)]
        ids.append(daemon.run("need", str(missing), id="mine")["id"])
        daemon.restart()
        listed = daemon.request({"command": "dead"})["result"]
        assert [entry["id"] for entry in listed["jobs"]] == ids
        assert listed["jobs"][0]["error"]["type"] == "FileNotFoundError"
        assert daemon.status()["jobs"]["dead"] == 4
        page = daemon.request({"command": "dead", "limit": 3})["result"]
        rest = daemon.request({"command": "dead", "limit": 3, "after": page["next"]})["result"]
        assert [entry["id"] for entry in page["jobs"] + rest["jobs"]] == ids
        missing.write_text("here")
        assert daemon.request({"command": "dead", "action": "retry", "id": ids[1]})["result"] == {"retried": 1}
        daemon.wait_until_done()
        assert daemon.request({"command": "dead", "action": "delete", "id": ids[0]})["result"] == {"deleted": 1}
        assert daemon.request({"command": "dead", "action": "retry", "all": True})["result"] == {"retried": 2}
        daemon.wait_until_done()
        assert daemon.status()["jobs"]["dead"] == 0
        assert daemon.request(job("need", str(missing), id="mine"))["status"] == "duplicate"


def test_a_dead_job_can_be_found_as_soon_as_its_line_is_there(tmp_path: Path) -> None:
    """`dead` by id, straight after the line that says so, while many others come in and die."""
    source = "class T:\n    def fail(self, a): raise ValueError\n    def noop(self, a): pass\n"
    with Daemon(tmp_path, source) as daemon, daemon.connect() as client, daemon.connect() as other:
        for _ in range(300):
            client.send(job("fail", reply="result"))
            client.send(job("noop", "x" * 500))
        ended = 0
        while ended < 300:
            line = client.recv()
            if line["status"] == "dead":
                ended += 1
                assert "result" in other.request({"command": "dead", "id": line["id"]}), line["id"]


def test_two_daemons_do_not_share_a_spool_or_a_socket(tmp_path: Path) -> None:
    """The second refuses to start, with one line, and the first is not disturbed."""
    with Daemon(tmp_path, SOURCE) as daemon:
        second = daemon.command("run", "--config", str(daemon.config_file))
        assert second.returncode != 0
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert daemon.status()["state"] == "running"


def test_a_stale_socket_is_replaced_and_a_foreign_file_is_not(tmp_path: Path) -> None:
    """A socket left by a kill -9 is no obstacle; a file that is no socket is not touched."""
    with Daemon(tmp_path, SOURCE, start=False) as daemon:
        with socket.socket(socket.AF_UNIX) as leftover:
            leftover.bind(str(daemon.socket))
        daemon.start()
        assert oct(daemon.socket.stat().st_mode & 0o777) == "0o660"
        daemon.stop()
        daemon.socket.write_text("precious")
        daemon.start(wait=False)
        assert daemon.wait() == 78
        assert daemon.socket.read_text() == "precious"


def test_a_backlog_beyond_the_window_costs_disk_and_keeps_its_order(tmp_path: Path) -> None:
    """More jobs than memory holds: all run, in order with one worker, over a restart in the middle."""
    count = 120_000
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        with daemon.connect() as client:
            client.request(job("wait_for", str(gate), priority=0))
            for start in range(0, count, 20_000):
                replies = client.pipeline(job("record", [str(ledger), n]) for n in range(start, start + 20_000))
                assert all(reply["status"] == "accepted" for reply in replies)
        assert daemon.status()["jobs"]["ready"] == count
        gate.touch()
        wait_until(lambda: len(numbers(ledger)) > 1000)
        daemon.restart()
        daemon.wait_until_done()
        assert numbers(ledger) == list(range(count))


@pytest.mark.parametrize("path", ["spool.db", ""], ids=["durable", "in memory"])
def test_results_of_jobs_beyond_the_window_reach_their_clients(tmp_path: Path, path: str) -> None:
    """Jobs that were in the spool only, behind 60,000 others, still get their second line; so does one whose id
    and tiny delay make it enter late, while the window is full.
    """
    gate = tmp_path / "gate"
    where = {"path": path and str(tmp_path / path)}
    with Daemon(tmp_path, SOURCE, workers={"count": 1}, spool=where) as daemon, daemon.connect() as client:
        client.request(job("wait_for", str(gate), priority=0))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        client.pipeline([job("noop")] * 60_000)
        late = [job("noop", reply="result") for _ in range(100)]
        late += [job("noop", reply="result", id=f"late-{n}", delay=0.00001) for n in range(20)]
        for request in late:
            client.send(request)
        accepted = [client.recv()["status"] for _ in late]
        assert accepted == ["accepted"] * 120
        gate.touch()
        assert [client.recv()["status"] for _ in late] == ["succeeded"] * 120
        daemon.wait_until_done()


def test_a_worker_that_dies_while_the_daemon_drains_does_not_hold_it_up(tmp_path: Path) -> None:
    """The last running job takes its worker with it: the drain is over then, not at the end of drain_timeout."""
    source = "import os, time\nclass T:\n    def die(self, a):\n        while not os.path.exists(a): time.sleep(0.01)\n        os._exit(1)\n"
    with Daemon(tmp_path, source, workers={"drain_timeout": 3600.0}) as daemon:
        daemon.request(job("die", str(tmp_path / "gate")))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        daemon.kill(signal.SIGTERM)
        daemon.notifications.wait_for(lambda message: "STOPPING" in message)
        (tmp_path / "gate").touch()
        assert daemon.wait() == 0


def test_no_process_outlives_the_daemon(tmp_path: Path) -> None:
    """SIGKILL while idle: fork server and workers are gone within a moment, also when they are stopped."""
    with Daemon(tmp_path, SOURCE) as daemon:
        family = daemon.descendants()
        assert len(family) >= 3
        for process in family:
            process.kill(signal.SIGSTOP)
        daemon.kill(signal.SIGKILL)
        wait_until(lambda: not any(isinstance(p, Process) and p.alive for p in family), "all are gone", 10)


def test_a_million_queued_jobs_fit_into_200_mib(tmp_path: Path) -> None:
    """The backlog is on the disk: at no time does the daemon have more than 200 MiB of resident memory, neither
    while a million jobs come in, nor after a restart on top of them, and none is missing.
    """
    count = 1_000_000
    line = b'{"target": "noop", "arguments": {"key": "value"}}\n'
    gates = [str(tmp_path / name) for name in ("one", "two")]
    with Daemon(tmp_path, SOURCE) as daemon:
        with daemon.connect() as client:
            client.batch([job("wait_for", gate, priority=0) for gate in gates])
            daemon.wait_until(lambda status: status["jobs"]["running"] == 2)
            sender = threading.Thread(target=send, args=(client.socket, line, count))
            sender.start()
            replies = 0
            while replies < count:
                replies += client.socket.recv(2**20).count(b"\n")
            sender.join()
        assert daemon.status()["jobs"]["ready"] == count
        assert peak_memory(daemon.pid) < 200 * 2**20
        daemon.kill(signal.SIGKILL)
        daemon.start()
        assert daemon.status()["jobs"]["ready"] >= count
        for gate in gates:
            Path(gate).touch()
        status = daemon.wait_until_done()
        assert status["targets"]["noop"]["succeeded"] == count
        assert peak_memory(daemon.pid) < 200 * 2**20


def send(sock: socket.socket, line: bytes, count: int) -> None:
    """In pieces: a socket's timeout is for all of one call."""
    for _ in range(0, count, 10_000):
        sock.sendall(line * 10_000)


def peak_memory(pid: int) -> int:
    """The most resident memory that the process ever had, in bytes (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
