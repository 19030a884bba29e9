"""The daemon under a real systemd: what `systemctl`, the journal and Prometheus make of it."""

from __future__ import annotations

import collections
import itertools
import json
import re
import select
import shutil
import threading
import time
from functools import partial
from urllib.parse import urlencode

import pytest
from daemon_process import job, wait_until
from systemd.service import CONFIG, METRICS, STATE, UNIT, UNITS, Service, blocks

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

QUERY = 'workerd_jobs_finished_total{target="edition",outcome="succeeded"}'
ERRANDS_SECOND = """
class Errands:
    def edition(self, _):
        return "second"
"""


def main_process_ended(service: Service, pid: int) -> None:
    """Wait until the daemon is another process than that one, and ready."""
    wait_until(lambda: service.pid not in {0, pid} and service.show("SubState") == "running", "a new daemon runs")


# --- start ------------------------------------------------------------------------------------------------


def test_first_job(first_installation: str) -> None:
    """Installing ends with a job that was done over the socket, its result and its metric."""
    said = first_installation
    assert "submit --socket /run/workerd.sock --wait hello" in said
    assert '"Hello, workerd!"' in said
    assert re.search(
        r'^workerd_jobs_finished_total\{(?=.*target="hello")(?=.*outcome="succeeded").*\} 1\.0$', said, re.MULTILINE
    )


def test_start(service: Service) -> None:
    """`systemctl start` returns when the daemon serves: its workers are there, and STATUS counts them."""
    assert service.show("ActiveState") == "active"
    assert service.status()["workers"]["idle"] == 2
    assert re.search(r"2 workers, 0 queued, 0 running", service.show("StatusText"))
    printed = service.machine.output(f"systemctl status {UNIT}")
    assert re.search(r'Status: "running: 2 workers, 0 queued, 0 running"', printed)
    assert service.records("MESSAGE_ID=d6445b4ae25a42909516a48013ff187f", f"_PID={service.pid}")


def test_daemon_is_not_root(service: Service) -> None:
    """Daemon and workers run as the user workerd; who may submit is decided by the group of the socket."""
    pids = [service.pid, *(process["pid"] for process in service.status()["processes"])]
    for pid in pids:
        assert service.machine.output(f"stat --format=%U /proc/{pid}") == "workerd"
    assert service.machine.output("stat --format='%U %G %a' /run/workerd.sock") == "workerd workerd-submit 660"
    assert service.machine.output(f"stat --format='%U %a' {STATE}") == "workerd 700"


def test_who_may_submit(service: Service) -> None:
    """A member of workerd-submit may submit a job, and nobody else may."""
    machine = service.machine
    machine.run("useradd --user-group --groups workerd-submit friend; useradd --user-group stranger", check=False)
    submit = "/opt/workerd/venv/bin/workerd submit --wait edition"
    assert json.loads(machine.run(submit, user="friend").stdout) == "first"
    refused = machine.run(submit, user="stranger", check=False)
    assert refused.returncode != 0
    assert "workerd-submit" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_who_may_administer(service: Service) -> None:
    """Who may submit may not retire workers, nor see or delete the dead jobs of others; root may. The journal has the
    uid and the pid of who was denied, and of who submitted what died.
    """
    machine = service.machine
    machine.run("useradd --user-group --groups workerd-submit friend", check=False)
    uid = machine.output("id --user friend")
    workerd = "/opt/workerd/venv/bin/workerd"
    service.work("touch", "/nowhere", id="of-root")
    assert machine.run(f"{workerd} submit --wait touch '\"/nowhere\"'", user="friend", check=False).returncode == 1
    for command in (f"{workerd} dead --delete --all", f"{workerd} dead --retry of-root"):
        refused = machine.run(command, user="friend", check=False)
        assert refused.returncode == 1
        assert f"user {uid} may not " in refused.stderr
    assert "of-root" not in machine.run(f"{workerd} dead", user="friend").stdout
    (denied, *_) = service.records("WORKERD_EVENT=access_denied", f"WORKERD_UID={uid}")
    assert int(denied["WORKERD_PID"]) > 1
    assert service.records("WORKERD_EVENT=job_dead", f"WORKERD_UID={uid}")
    assert machine.run(f"{workerd} dead --delete --all").stdout == "2 jobs deleted\n"


def test_the_sandbox_scores_as_promised_with_the_example_in_it(service: Service) -> None:
    """`systemd-analyze security` of the running unit, with the configuration and the class that are shipped, and each
    kind of its jobs done: 1.0 or better.
    """
    machine = service.machine
    machine.write(CONFIG, (UNITS.parent / "etc/workerd.toml").read_text())
    machine.run(f"systemctl restart {UNIT}")
    assert service.work("hello", {"name": "you"})["status"] == "succeeded"
    assert service.status()["config"] == CONFIG
    printed = machine.output(f"systemd-analyze security --no-pager {UNIT}")
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", printed)
    assert score
    assert float(score[1]) <= 1.0


def test_jobs_are_confined(service: Service) -> None:
    """A job can write to the state folder and nowhere else, and has no network, though /metrics is served."""
    assert service.work("touch", f"{STATE}/here")["status"] == "succeeded"
    for path in ("/srv/jobs/there", "/etc/there", "/opt/workerd/there", "/root/there"):
        error = service.work("touch", path)["error"]
        assert error["type"] in {"OSError", "PermissionError", "FileNotFoundError"}, error
    assert service.work("call")["status"] == "dead"
    assert service.get(f"{METRICS}/readyz")


def test_jobs_that_need_the_network(service: Service) -> None:
    """With that block of jobs-need-more.conf uncommented, a job can connect to what it could not."""
    network = next(settings for _, settings in blocks() if "PrivateNetwork=no" in settings)
    service.drop_in(network)
    service.machine.run(f"systemctl restart {UNIT}")
    assert service.work("call")["status"] == "succeeded"


def test_memory_killer_takes_workers_first(service: Service) -> None:
    """The kernel, short of memory, spares the daemon and takes a worker; that does not stop the service."""
    # a machine in a container may not be allowed to spare anything: then the kernel has 0 for the daemon
    assert service.show("OOMScoreAdjust") == "-500"
    for process in service.status()["processes"]:
        assert int(service.machine.read(f"/proc/{process['pid']}/oom_score_adj")) >= 0
    assert service.show("OOMPolicy") == "continue"


# --- work -------------------------------------------------------------------------------------------------


def test_submit_and_metric(service: Service) -> None:
    """A job over the socket is done, counted, and named in the journal."""
    assert service.work("edition")["result"] == "first"
    assert service.metric("workerd_jobs_finished_total", target="edition", outcome="succeeded") == 1
    assert service.metric("workerd_workers") == 2
    assert service.metric("process_resident_memory_bytes") > 0


def test_the_journal_is_told_what_it_lost(service: Service) -> None:
    """While journald is stopped, jobs that print end all the same; once it goes on, it is told how many records it did
    not take, though nothing else is logged.
    """
    service.drop_in("LogRateLimitIntervalSec=0")  # journald's own, which would be told of by journald
    service.machine.run(f"systemctl restart {UNIT}")
    journald = service.machine.output("pgrep --exact systemd-journal")
    service.machine.run(f"kill -STOP {journald}")
    try:
        for _ in range(20):
            assert service.work("say", "x\n" * 1500)["status"] == "succeeded"
    finally:
        service.machine.run(f"kill -CONT {journald}")
    (record,) = wait_until(lambda: service.records("WORKERD_EVENT=log_lost", f"_PID={service.pid}"))
    lost = re.fullmatch(r"(\d+) log records were lost: the journal did not take them", record["MESSAGE"])
    assert lost
    assert service.metric("workerd_log_records_lost_total", reason="refused") == int(lost[1])


def test_journal_finds_a_job(service: Service) -> None:
    """What a job prints is in the journal under its id, target and worker."""
    service.work("say", "found me", id="find-me")
    records = wait_until(lambda: service.records("WORKERD_JOB_ID=find-me", f"_SYSTEMD_UNIT={UNIT}"), "a record")
    said = next(record for record in records if "found me" in record["MESSAGE"])
    assert said["WORKERD_TARGET"] == "say"
    assert said["WORKERD_WORKER"] in {"0", "1"}


def test_killed_worker(service: Service) -> None:
    """A worker that is killed is replaced; the job that it ran is charged, and no other."""
    with service.connect() as client:
        assert client.request(job("wait_for", "gate", id="hit", reply="result", max_crashes=1))["status"] == "accepted"
        assert client.request(job("wait_for", "gate", id="spared", reply="result"))["status"] == "accepted"
        before = service.wait_for_running(2)
        victim = next(process["pid"] for process in before["processes"] if process["job"] == "hit")
        service.machine.run(f"kill -9 {victim}")
        dead = client.recv()
        assert dead["id"] == "hit"
        assert dead["error"]["reason"] == "crashed"
        assert dead["crashes"] == 1
        service.open("gate")
        assert client.recv() | {"duration": 0} == {
            "id": "spared",
            "status": "succeeded",
            "result": "opened",
            "attempts": 1,
            "duration": 0,
        }
    after = service.wait_for_status(lambda status: status["workers"]["idle"] == 2, "two workers are idle")
    assert victim not in [process["pid"] for process in after["processes"]]
    assert service.metric("workerd_worker_exits_total") >= 1
    assert service.show("NRestarts") == "0"


def test_killed_daemon_loses_nothing(service: Service) -> None:
    """1,000 acknowledged jobs survive `kill -9` of the daemon: systemd restarts it, and each of them runs."""
    with service.connect() as client:
        client.pipeline(job("wait_for", "gate", id=f"gate-{n}") for n in range(2))
        service.wait_for_running(2)
        replies = client.pipeline(job("note", n, id=f"note-{n}") for n in range(1000))
    assert [reply["status"] for reply in replies] == ["accepted"] * 1000
    assert service.notes() == []
    pid = service.pid
    workers = [process["pid"] for process in service.status()["processes"]]
    service.machine.run(f"kill -9 {pid}")
    main_process_ended(service, pid)
    for worker in workers:
        assert not service.machine.path(f"/proc/{worker}").exists()
    service.open("gate")
    wait_until(lambda: len(service.notes()) >= 1000, "every note is written")
    service.wait_for_status(lambda status: not any(status["jobs"].values()), "no jobs are left, dead ones included")
    assert sorted(service.notes(), key=int) == [str(n) for n in range(1000)]
    assert service.show("NRestarts") == "1"


# --- reload -----------------------------------------------------------------------------------------------


def test_reload(service: Service) -> None:
    """`systemctl reload` takes a new worker count and changed code into use, without a restart."""
    pid = service.pid
    service.machine.write("/srv/jobs/errands.py", ERRANDS_SECOND)
    service.configure(workers=3)
    service.machine.run(f"systemctl reload {UNIT}")
    service.wait_for_text("running: 3 workers")
    assert service.work("edition")["result"] == "second"
    assert service.metric("workerd_config_last_reload_successful") == 1
    assert service.pid == pid
    assert service.show("ActiveState") == "active"


def test_reload_of_a_bad_configuration(service: Service) -> None:
    """A reload that cannot be done leaves all as it was, and says why."""
    pid = service.pid
    service.machine.write(CONFIG, "[workers]\ncount = -1\n")
    service.machine.run(f"systemctl reload {UNIT}")
    text = service.wait_for_text("reload failed")
    assert "count" in text
    assert service.work("edition")["result"] == "first"
    assert service.metric("workerd_config_last_reload_successful") == 0
    assert service.pid == pid
    assert service.records("MESSAGE_ID=3d18c71d916e4b0ba0241fce9d169cd9", f"_PID={pid}")
    service.configure()
    service.machine.run(f"systemctl reload {UNIT}")
    wait_until(lambda: "reload failed" not in service.show("StatusText"), "the reason is gone")


def test_reload_may_take_longer_than_systemd_waits(service: Service) -> None:
    """The daemon asks for more time while the class is imported: TimeoutStartSec= does not make a failure of a reload
    that succeeds.
    """
    service.drop_in("TimeoutStartSec=8s")  # longer than from one plea to the next: systemd forgets the first
    service.machine.run(f"systemctl restart {UNIT}")
    gate = "import os, time\nwhile not os.path.exists('/var/lib/workerd/gate'): time.sleep(0.01)\n"
    service.machine.write("/srv/jobs/errands.py", gate + ERRANDS_SECOND)
    service.machine.run(f"systemctl reload --no-block {UNIT}")
    service.wait_for_property("ActiveState", "reloading")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 18, "twice that, and more, has passed")
    assert service.show("ActiveState") == "reloading"
    service.open("gate")
    service.wait_for_property("ActiveState", "active")
    assert service.show("ReloadResult") == "success"
    assert service.work("edition")["result"] == "second"


def test_check_by_root_runs_the_class_as_the_service(service: Service) -> None:
    """As the installer's message has it, `workerd check` finds out itself whose service it is: no code is root's."""
    service.machine.write("/srv/jobs/errands.py", f"import os\nprint('uid', os.getuid())\n{ERRANDS_SECOND}")
    done = service.machine.run(f"/opt/workerd/venv/bin/workerd check --config {CONFIG}")
    assert "edition" in done.stdout
    uid = service.machine.output("id --user workerd")
    assert done.stderr.splitlines() == ["workerd: the class is imported as user workerd", f"uid {uid}"]


# --- stop and restart -------------------------------------------------------------------------------------


def test_bad_configuration_is_not_tried_again(service: Service) -> None:
    """A daemon that exits for its configuration, status 78, is not restarted: that would not mend it."""
    service.machine.run(f"systemctl stop {UNIT}")
    service.machine.write(CONFIG, "[workers]\ncount = -1\n")
    assert service.machine.run(f"systemctl start {UNIT}", check=False).returncode != 0
    assert service.show("ActiveState") == "failed"  # one that is to be tried again is "activating"
    assert service.show("ExecMainStatus") == "78"
    assert service.show("NRestarts") == "0"
    assert any("count" in record["MESSAGE"] for record in service.records(f"_SYSTEMD_UNIT={UNIT}")[-10:])


def test_stop_drains(service: Service) -> None:
    """`systemctl stop` lets running jobs finish, takes no new ones, and keeps what is queued."""
    with service.connect() as client:
        client.pipeline(job("wait_for", f"gate-{n}", id=f"run-{n}", reply="result") for n in range(2))
        service.wait_for_running(2)
        assert client.request(job("note", "later"))["status"] == "accepted"
        service.machine.run(f"systemctl stop --no-block workerd.socket {UNIT}")
        service.wait_for_text("draining")
        assert client.request(job("note", "refused"))["error"]["code"] == "draining"
        for n in range(2):
            service.open(f"gate-{n}")
            assert client.recv()["result"] == "opened"
        service.wait_for_property("ActiveState", "inactive")
    assert service.show("Result") == "success"
    assert service.show("ExecMainStatus") == "0"
    assert not service.machine.path("/run/workerd.sock").exists()
    assert service.notes() == []
    service.machine.run(f"systemctl start {UNIT}")
    wait_until(lambda: service.notes() == ["later"], "the job that was queued is done")


def test_drain_may_take_longer_than_systemd_waits(service: Service) -> None:
    """The daemon asks for more time while jobs still run: TimeoutStopSec= does not cut its drain short."""
    service.drop_in("TimeoutStopSec=1s")
    with service.connect() as client:
        client.request(job("wait_for", "gate", reply="result"))
        service.wait_for_running(1)
        service.machine.run(f"systemctl stop --no-block workerd.socket {UNIT}")
        service.wait_for_property("ActiveState", "deactivating")
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 3, "three times that have passed")
        service.open("gate")
        assert client.recv()["result"] == "opened"
    service.wait_for_property("ActiveState", "inactive")
    assert service.show("Result") == "success"


def test_clients_of_a_restart_wait(service: Service) -> None:
    """Clients that connect while the daemon restarts are served by the next one; no job of theirs is lost."""
    old = service.pid
    with service.connect() as client:
        client.request(job("wait_for", "gate", reply="result"))
        service.wait_for_running(1)
        service.machine.run(f"systemctl restart --no-block {UNIT}")
        service.wait_for_property("ActiveState", "deactivating")
        service.wait_for_text("draining")
        waiting = [service.connect() for _ in range(50)]
        for n, other in enumerate(waiting):
            other.send(job("note", n))
        assert select.select([other.socket for other in waiting], [], [], 0)[0] == []
        service.open("gate")
        assert client.recv()["result"] == "opened"
        assert [other.recv()["status"] for other in waiting] == ["accepted"] * 50
        for other in waiting:
            other.close()
    assert service.pid != old
    wait_until(lambda: sorted(service.notes(), key=int) == [str(n) for n in range(50)], "every note is written, once")


def test_restarts_in_a_loop_under_load(service: Service) -> None:
    """`systemctl restart` again and again while clients connect and submit all the time: no connection is ever refused,
    and every job that was acknowledged has run.
    """
    over = threading.Event()
    accepted: list[int] = []
    troubles: list[str] = []
    numbers = itertools.count()

    def load() -> None:
        while not over.is_set():
            try:
                with service.connect() as client:
                    for _ in range(50):
                        asked = [next(numbers) for _ in range(20)]
                        client.send(b"".join(json.dumps(job("note", n)).encode() + b"\n" for n in asked))
                        accepted.extend(number for number in asked if client.recv().get("status"))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                pass  # the daemon that had it is gone; what it had not answered nobody knows
            except OSError as error:
                troubles.append(repr(error))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    pids = {service.pid}
    for _ in range(6):
        enough = len(accepted) + 100
        wait_until(partial(lambda enough: len(accepted) > enough, enough), "jobs are accepted")
        service.machine.run(f"systemctl restart {UNIT}")
        pids.add(service.pid)
    over.set()
    for client in clients:
        client.join()
    assert troubles == []
    assert len(pids) == 7
    service.wait_for_status(lambda status: not any(status["jobs"].values()), "all jobs are done")
    ran = collections.Counter(map(int, service.notes()))
    assert len(accepted) >= 700
    assert set(accepted) - set(ran) == set(), "none is lost"
    assert [number for number in accepted if ran[number] > 1] == [], "nor run twice: a restart is orderly"


def test_client_starts_a_stopped_daemon(service: Service) -> None:
    """The socket is there without the daemon, and the first client that connects has it started."""
    service.machine.run(f"systemctl stop {UNIT}")
    assert service.show("ActiveState") == "inactive"
    assert service.work("edition")["result"] == "first"
    assert service.show("ActiveState") == "active"


def test_stuck_daemon_is_restarted(service: Service) -> None:
    """A daemon that no longer turns is missed by systemd's watchdog, killed with its workers, and restarted. The job that
    ran is not charged for it, and runs again; the journal says where the daemon stood.
    """
    service.machine.run(f"systemctl stop {UNIT}")
    service.drop_in("WatchdogSec=3s")
    service.machine.run(f"systemctl start {UNIT}")
    pid = service.pid
    workers = [process["pid"] for process in service.status()["processes"]]
    service.request(job("wait_for", "gate", id="innocent", max_crashes=1))
    service.wait_for_running(1)
    service.machine.run(f"kill -STOP {pid}")
    main_process_ended(service, pid)
    assert service.show("NRestarts") == "1"
    assert any("atchdog timeout" in record["MESSAGE"] for record in service.records(f"UNIT={UNIT}"))
    for worker in workers:
        assert not service.machine.path(f"/proc/{worker}").exists()
    service.wait_for_running(1)
    db = "import sqlite3; print(sqlite3.connect('/var/lib/workerd/spool.db').execute('SELECT crashes FROM jobs').fetchall())"
    assert service.machine.run("python3 -", input=db).stdout.strip() == "[(0,)]"
    (record,) = service.records("MESSAGE_ID=eb01c4a109754cfe831758f829f96543")
    assert "Fatal Python error: Aborted" in record["MESSAGE"]
    service.open("gate")
    assert service.work("edition")["result"] == "first"


# --- beside it --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt-get install prometheus")
def test_prometheus(service: Service) -> None:
    """Debian's Prometheus scrapes the daemon, and answers a query for what it counted."""
    machine = service.machine
    for _ in range(3):
        service.work("edition")
    machine.write(
        "/srv/prometheus.yml",
        "scrape_configs:\n- job_name: workerd\n  scrape_interval: 1s\n"
        "  static_configs:\n  - targets: ['127.0.0.1:9754']\n",
    )
    machine.run(
        "systemd-run --quiet --unit=scraper prometheus --config.file=/srv/prometheus.yml"
        " --storage.tsdb.path=/srv/prometheus --web.listen-address=127.0.0.1:9090"
    )
    query = f"http://127.0.0.1:9090/api/v1/query?{urlencode({'query': QUERY})}"

    def answer() -> list[str]:
        got = json.loads(service.get(query, check=False) or "{}")
        return [result["value"][1] for result in got.get("data", {}).get("result", [])]

    try:
        wait_until(lambda: answer() == ["3"], "Prometheus has counted three jobs")
    finally:
        machine.run("systemctl stop scraper.service", check=False)
