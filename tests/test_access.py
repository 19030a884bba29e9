"""Who may do what: the kernel's word on who a client is, the rules of [access], what is kept and told of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import Client, Daemon, job, wait_until

from workerd.access import Access, Peer, Subjects
from workerd.job import Job, Options, Submitter
from workerd.quotas import Quotas

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE = """
import time
class Targets:
    def echo(self, arguments): return arguments
    def wipe(self, arguments): return "wiped"
    def fail(self, arguments): raise ValueError(arguments)
    def sleep(self, arguments): time.sleep(arguments)
"""
ALICE, BOB, STAFF, OTHERS = 61001, 61002, 61101, 61102  # numbers that no host gives to anybody

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@contextlib.contextmanager
def somebody(uid: int, *groups: int) -> Iterator[None]:
    """Be this user, with these groups, while inside."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(OTHERS)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def connect(daemon: Daemon, uid: int, *groups: int) -> Client:
    """A connection of this user's; the daemon's socket is open to all, since these tests are about what comes after."""
    daemon.socket.parent.chmod(0o755)
    with somebody(uid, *groups):
        return Client(daemon.socket)


def open_daemon(folder: Path, **sections: Any) -> Daemon:
    feeder = {"mode": "0666", **sections.pop("feeder", {})}
    return Daemon(folder, SOURCE, feeder=feeder, **sections)


def code(reply: Any) -> str:
    return str(reply.get("error", {}).get("code", reply.get("status", "done")))


# --- who ---------------------------------------------------------------------------------------------------


@needs_root
def test_the_kernel_tells_user_process_and_all_groups(short_path: Path) -> None:
    """The uid and pid of a peer, its primary group and the others, however many; not what it is afterwards. Nothing
    is kept of groups that do not matter: a thousand connections with all that there are would be gigabytes.
    """
    many = set(range(70000, 72000))
    short_path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "socket"))
        (short_path / "socket").chmod(0o666)
        listener.listen()
        for groups in ({STAFF}, many):
            with socket.socket(socket.AF_UNIX) as client:
                with somebody(ALICE, *groups):
                    client.connect(str(short_path / "socket"))
                with listener.accept()[0] as accepted:
                    found = Peer.of(accepted, frozenset({OTHERS, BOB, *groups}))
                    assert found == Peer(Submitter(ALICE, os.getpid()), frozenset({OTHERS, *groups}))
                    assert Peer.of(accepted, frozenset({BOB})).groups == frozenset()


def test_groups_are_not_asked_for_where_none_matters() -> None:
    """Whoever connects again and again with all groups that there are keeps nobody waiting, unless some are named."""
    asked = {socket.SO_PEERCRED: struct.pack("@iII", 7, ALICE, OTHERS)}
    fake: Any = SimpleNamespace(getsockopt=lambda _level, option, _size: asked[option])
    assert Peer.of(fake, frozenset()) == Peer(Submitter(ALICE, 7), frozenset())


def test_rules_are_the_most_particular_ones() -> None:
    """A target's own list takes the place of the general one; root and the daemon's own user pass all of them."""
    access = Access(
        submit=Subjects(users=frozenset({ALICE})),
        administer=Subjects(groups=frozenset({STAFF})),
        targets={"wipe": Subjects(groups=frozenset({STAFF})), "free": Subjects(everybody=True)},
    )
    alice = Peer(Submitter(ALICE, 1), frozenset({OTHERS}))
    bob = Peer(Submitter(BOB, 1), frozenset({OTHERS, STAFF}))
    stranger = Peer(Submitter(61003, 1), frozenset({OTHERS}))
    root = Peer(Submitter(0, 1), frozenset())
    myself = Peer(Submitter(os.geteuid(), 1), frozenset())
    allowed = {
        (name, target)
        for name, peer in [("alice", alice), ("bob", bob), ("stranger", stranger), ("root", root), ("myself", myself)]
        for target in ("echo", "wipe", "free")
        if access.may_submit(peer, target)
    }
    everything = {(name, target) for name in ("root", "myself") for target in ("echo", "wipe", "free")}
    free = {(name, "free") for name in ("alice", "bob", "stranger")}
    assert allowed == {("alice", "echo"), ("bob", "wipe"), *free, *everything}
    assert [access.may_administer(peer) for peer in (alice, bob, stranger, root, myself)] == [0, 1, 0, 1, 1]


# --- what they may do --------------------------------------------------------------------------------------


@needs_root
def test_who_is_not_listed_is_refused_counted_and_told_of(tmp_path: Path) -> None:
    """By user, by group, by target: each job of a chunk is decided by itself, an array as a whole. The refusal names
    the reason, the log the uid and the pid, the metric the number; nothing of it ran.
    """
    access = {"submit": [str(ALICE), f"@{STAFF}"], "targets": {"wipe": [str(ALICE)]}}
    with open_daemon(tmp_path, access=access) as daemon:
        with connect(daemon, ALICE) as alice, connect(daemon, BOB, STAFF) as bob, connect(daemon, 61003) as stranger:
            chunk = [job("echo"), job("wipe", id="w"), job("nothing"), job("echo", priority=1)]
            assert [code(reply) for reply in alice.pipeline(chunk)] == [
                *("accepted", "accepted", "unknown_target", "accepted")
            ]
            assert [code(reply) for reply in bob.pipeline(chunk)] == [
                *("accepted", "forbidden", "unknown_target", "accepted")
            ]
            assert [code(reply) for reply in stranger.pipeline(chunk)] == [
                *("forbidden", "forbidden", "unknown_target", "forbidden")
            ]
            assert code(bob.batch([job("echo"), job("wipe")])) == "forbidden"
            assert isinstance(bob.batch([job("echo"), job("echo")]), list)
            refusal = stranger.request(job("wipe", id="mine"))
            assert refusal["id"] == "mine"
            assert refusal["error"]["message"] == (
                "user 61003 may not submit jobs of wipe; whoever administers this daemon may allow it ([access])"
            )
            assert stranger.request({"command": "ping"})["result"]["state"] == "running"
        assert f"denied: user 61003 (pid {os.getpid()}) may not submit jobs of echo" in daemon.log
        assert f"uid=61003 pid={os.getpid()}" in daemon.log
        assert 'workerd_jobs_rejected_total{reason="forbidden"} 7.0' in daemon.scrape()
        targets = daemon.wait_until_done()["targets"]
        assert (targets["echo"]["submitted"], targets["wipe"]["submitted"]) == (6, 1)


@needs_root
def test_only_administrators_administer(tmp_path: Path) -> None:
    """Retiring, retrying and deleting are refused to those who only submit, and allowed to root and to who is listed. The
    dead jobs of others are not shown either: their arguments may be secret.
    """
    with open_daemon(tmp_path, access={"administer": [f"@{STAFF}"]}) as daemon:
        with connect(daemon, ALICE) as alice, connect(daemon, BOB, STAFF) as bob:
            alice.request(job("fail", "alice's", id="a"))
            bob.request(job("fail", "bob's", id="b"))
            daemon.wait_until(lambda status: status["jobs"]["dead"] == 2)
            for request in (
                b"false\n",
                {"command": "dead", "action": "retry", "id": "a"},
                {"command": "dead", "action": "delete", "all": True},
            ):
                assert code(alice.request(request)) == "forbidden"

            def seen(client: Client, **which: Any) -> list[str]:
                reply = client.request({"command": "dead", **which})
                return [found["id"] for found in reply["result"]["jobs"]] if "result" in reply else [code(reply)]

            assert seen(alice) == ["a"]
            assert seen(alice, id="b") == ["not_found"]
            assert seen(bob) == ["a", "b"]
            (mine,) = alice.request({"command": "dead"})["result"]["jobs"]
            assert (mine["uid"], mine["pid"]) == (ALICE, os.getpid())
            assert bob.request({"command": "dead", "action": "retry", "id": "a"})["result"] == {"retried": 1}
            daemon.wait_until(lambda status: status["jobs"]["dead"] == 2)
            daemon.restart()
        with connect(daemon, BOB, STAFF) as bob:
            assert [found["uid"] for found in bob.request({"command": "dead"})["result"]["jobs"]] == [BOB, ALICE]
            assert bob.request({"command": "dead", "action": "delete", "all": True})["result"] == {"deleted": 2}
            assert bob.request(b"false\n")["result"] == {"wanted": 1}
        assert f"may not retire workers  uid={ALICE}" in daemon.log


@needs_root
def test_a_reload_changes_the_rules_for_open_connections(tmp_path: Path) -> None:
    """Who is let in by a reload need not connect again; who is shut out is refused at once."""
    rules = {"submit": [str(ALICE)]}
    with (
        open_daemon(tmp_path, access=rules) as daemon,
        connect(daemon, ALICE) as alice,
        connect(daemon, BOB, STAFF) as bob,
    ):
        assert [code(client.request(job("echo"))) for client in (alice, bob)] == ["accepted", "forbidden"]
        for who in (str(BOB), f"@{STAFF}"):
            daemon.configure(access={"submit": [who], "targets": {"wipe": [str(ALICE)]}})
            daemon.reload()
            assert [code(client.request(job("echo"))) for client in (alice, bob)] == ["forbidden", "accepted"]
            daemon.configure(access={"submit": [f"@{OTHERS}"], "targets": {"echo": [str(ALICE)]}})
            daemon.reload()
            assert [code(client.request(job("echo"))) for client in (alice, bob)] == ["accepted", "forbidden"]
            assert [code(client.request(job("fail"))) for client in (alice, bob)] == ["accepted", "accepted"]


@needs_root
def test_a_client_that_is_denied_again_and_again_does_not_fill_the_log(tmp_path: Path) -> None:
    """Ten thousand denials: each answered and counted, told in a few lines."""
    with open_daemon(tmp_path, access={"submit": [str(BOB)]}) as daemon:
        with connect(daemon, ALICE) as alice:
            assert {code(reply) for reply in alice.pipeline([job("echo")] * 10_000)} == {"forbidden"}
        assert daemon.log.count("denied: ") < 100
        assert 'workerd_jobs_rejected_total{reason="forbidden"} 10000.0' in daemon.scrape()


# --- how much they may have --------------------------------------------------------------------------------


@needs_root
def test_each_user_has_so_many_connections(tmp_path: Path) -> None:
    """One more is told why, and closed; others, and root, come in; what is closed makes room."""
    with open_daemon(tmp_path, access={"user_connections": 2}) as daemon:
        first, second = connect(daemon, ALICE), connect(daemon, ALICE)
        assert first.request({"command": "ping"})
        assert second.request({"command": "ping"})
        with connect(daemon, ALICE) as third:
            refusal = third.recv()["error"]
            assert refusal["code"] == "too_many_connections"
            assert f"user {ALICE} has 2 connections" in refusal["message"]
            assert third.rest() == []
        with connect(daemon, BOB) as bob:
            assert bob.request({"command": "ping"})
        assert 'workerd_jobs_rejected_total{reason="too_many_connections"} 1.0' in daemon.scrape()
        assert f"denied: user {ALICE} (pid {os.getpid()}) may not have one more connection" in daemon.log
        roots = [daemon.connect() for _ in range(5)]
        assert all(root.request({"command": "ping"}) for root in roots)
        first.close()

        def room() -> bool:
            with connect(daemon, ALICE) as client:
                return "result" in client.request({"command": "ping"})

        wait_until(room, "a closed connection makes room")
        second.close()


@needs_root
def test_root_comes_in_when_all_connections_are_taken(tmp_path: Path) -> None:
    """Others may take as many as there are: whoever has to look after that is let in all the same."""
    with open_daemon(tmp_path, feeder={"max_connections": 3}) as daemon:
        taken = [connect(daemon, ALICE) for _ in range(3)]
        assert all(client.request({"command": "ping"}) for client in taken)
        with connect(daemon, BOB) as bob:
            assert bob.recv()["error"]["code"] == "too_many_connections"
        assert daemon.request({"command": "ping"})["result"]["state"] == "running"
        for client in taken:
            client.close()


@needs_root
def test_each_user_may_queue_so_much(tmp_path: Path) -> None:
    """Jobs, and bytes of arguments: what fits is taken, the rest of the chunk refused; an array is taken or refused
    whole; what ends makes room, and a restart counts what is there.
    """
    limits = {"user_jobs": 5, "user_bytes": 1000}
    with open_daemon(tmp_path, access=limits, workers={"count": 1}) as daemon:
        with connect(daemon, ALICE) as alice, connect(daemon, BOB) as bob:
            later = job("echo", 1, delay=3600)
            codes = [code(reply) for reply in alice.pipeline([later] * 4)]
            assert codes == ["accepted"] * 4
            assert code(alice.batch([later, later])) == "quota_exceeded"
            assert code(alice.request(later | {"id": "own"})) == "accepted"
            refusal = alice.request(later)
            assert code(refusal) == "quota_exceeded"
            assert refusal["error"]["message"] == (
                f"user {ALICE} may have no more than 5 jobs with 1000 bytes, dead ones included "
                "([access] user_jobs, user_bytes); try again later"
            )
            assert code(bob.request(job("echo", "x" * 998, delay=3600))) == "accepted"
            assert [code(reply) for reply in bob.pipeline([job("echo", 1)] * 3)] == ["quota_exceeded"] * 3
            assert [code(reply) for reply in daemon.connect().pipeline([later] * 9)] == ["accepted"] * 9
            assert 'workerd_jobs_rejected_total{reason="quota_exceeded"} 6.0' in daemon.scrape()
            daemon.kill()
            daemon.start()
        with connect(daemon, ALICE) as alice:
            assert code(alice.request(job("echo"))) == "quota_exceeded"
            daemon.configure(access={"user_jobs": 6, "user_bytes": 0})
            daemon.reload()
            for _ in range(20):  # each makes room for the next
                assert code(alice.request(job("echo", "x" * 2000, reply="result"))) == "accepted"
                assert alice.recv()["status"] == "succeeded"
            assert code(alice.request(job("fail", reply="result"))) == "accepted"
            assert alice.recv()["status"] == "dead"
            assert code(alice.request(job("echo"))) == "quota_exceeded", "what is dead is kept, and counts"
            assert daemon.request({"command": "dead", "action": "retry", "all": True})["result"] == {"retried": 1}
            daemon.wait_until(lambda status: status["jobs"]["dead"] == 1)
            assert code(alice.request(job("echo"))) == "quota_exceeded"
            assert daemon.request({"command": "dead", "action": "delete", "all": True})["result"] == {"deleted": 1}
            assert code(alice.request(later)) == "accepted"
            assert code(alice.request(later)) == "quota_exceeded"


@needs_root
def test_jobs_with_ids_are_counted_as_they_come(tmp_path: Path) -> None:
    """Many connections that send at once, before anything is stored: no more is accepted than one user may have."""
    with open_daemon(tmp_path, access={"user_jobs": 10}) as daemon:
        clients = [connect(daemon, ALICE) for _ in range(50)]
        for number, client in enumerate(clients):
            client.send(job("echo", delay=3600, id=f"{number}"))
        assert sorted(code(client.recv()) for client in clients) == ["accepted"] * 10 + ["quota_exceeded"] * 40
        for number, client in enumerate(clients):
            client.send(job("echo", delay=3600, id=f"{number}"))
            client.close()


@needs_root
def test_whoever_may_not_submit_cannot_keep_others_waiting(tmp_path: Path) -> None:
    """A flood of listings of dead jobs, of which the sender has none: another one's job is acknowledged meanwhile."""
    with open_daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            client.pipeline(job("fail", "x" * 300) for _ in range(5000))
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 5000)
        with connect(daemon, ALICE) as alice, connect(daemon, BOB) as bob:
            alice.socket.settimeout(1)
            with contextlib.suppress(TimeoutError):
                alice.send(b'{"command":"dead"}\n' * 20_000)
            for number in range(5):
                assert code(bob.request(job("echo", id=f"{number}"))) == "accepted"
            assert bob.request({"command": "dead"})["result"]["total"] == 0
            alice.socket.setblocking(False)
            answered = 0
            with contextlib.suppress(BlockingIOError):
                while data := alice.socket.recv(2**20):
                    answered += data.count(b"\n")
            assert answered < 10_000, "all that went before"


@needs_root
def test_what_others_run_is_not_told(tmp_path: Path) -> None:
    """`status` tells the ids of running jobs to whoever submitted them, and to administrators."""
    with open_daemon(tmp_path) as daemon, connect(daemon, ALICE) as alice, connect(daemon, BOB) as bob:
        alice.request(job("sleep", 60, id="secret"))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)

        def seen(client: Client) -> set[Any]:
            return {process["job"] for process in client.request({"command": "status"})["result"]["processes"]}

        assert (seen(alice), seen(bob), seen(daemon.connect())) == ({"secret", None}, {None}, {"secret", None})


def test_quotas_come_out_even() -> None:
    """Whatever is added and removed, in whatever order, nothing is left of a user without jobs."""
    quotas = Quotas(3, 10)
    jobs = [Job(seq, "t", b"x" * seq, Options(), 0.0, 0.0, Submitter(seq % 2, 1)) for seq in range(6)]
    unknown = Job(9, "t", b"xx", Options(), 0.0, 0.0)
    assert quotas.room(1, [4, 4, 4]) == 2
    assert quotas.room(1, [1, 1, 1, 1]) == 3
    assert quotas.room(1, [11]) == 0
    quotas.add([*jobs, unknown])
    assert (quotas.room(1, [0]), quotas.room(0, [0])) == (0, 0)
    quotas.remove(jobs[:2])
    assert quotas.room(0, [4, 1]) == 1
    quotas.load({1: (1, 5)})
    quotas.remove([*jobs[2:], unknown])
    quotas.remove([Job(5, "t", b"12345", Options(), 0.0, 0.0, Submitter(1, 1))])
    assert quotas.users == {}


# --- what is told, and kept --------------------------------------------------------------------------------


def test_the_submitter_is_told_with_the_job(tmp_path: Path) -> None:
    """In the log, in `workerd dead ID` and in its JSON; also of a job that came out of the spool."""
    with Daemon(tmp_path, SOURCE) as daemon:
        daemon.request(job("fail", "boom", id="f", delay=0.5))
        daemon.kill()
        daemon.start()
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 1)
        assert f"job=f target=fail uid={os.geteuid()} pid={os.getpid()}" in daemon.log
        shown = daemon.command("dead", "f")
        assert f" by root (pid {os.getpid()})" in shown.stdout or os.geteuid() != 0
        assert json.loads(daemon.command("dead", "--json", "f").stdout)["uid"] == os.geteuid()


def test_nobody_else_can_read_what_is_kept(tmp_path: Path) -> None:
    """A state folder that the daemon makes is 0700, the files in it 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with Daemon(tmp_path, SOURCE, spool={"path": str(tmp_path / "state" / "spool.db")}) as daemon:
            daemon.request(job("echo", "secret", delay=60))
            assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
            assert {"spool.db", "spool.db-wal", "spool.db.claims", "spool.db.lock", "spool.db.stack"} <= set(modes)
            assert set(modes.values()) == {0o600}
    finally:
        os.umask(before)


def test_a_name_that_this_host_does_not_know_is_refused(tmp_path: Path) -> None:
    """[access] names users and groups of this host, or numbers, and targets of the class; each mistake is told."""
    with Daemon(tmp_path, SOURCE, start=False) as daemon:
        mistakes: list[tuple[dict[str, Any], str]] = [
            ({"submit": ["no_such_user"]}, '[access] submit: received ["no_such_user"] (this host has no user'),
            ({"administer": ["@no_such_group"]}, "this host has no group 'no_such_group'"),
            ({"administer": "root"}, "(not a list); give a list of users, and groups"),
            ({"administer": [0]}, "(not a string)"),
            ({"targets": {"wipe": ["nobody_here"]}}, "(wipe: this host has no user 'nobody_here')"),
            ({"targets": {"wine": ["root"]}}, "[access] targets.wine: attributes:Targets has no public method wine"),
            ({"user_jobs": -1}, "[access] user_jobs: received -1; give a whole number"),
        ]
        for access, told in mistakes:
            daemon.sections["access"] = access
            daemon.configure()
            checked = daemon.command("check", "--as-root", "--config", str(daemon.config_file))
            assert checked.returncode == 78
            assert told in checked.stderr


# --- what cannot be forged ---------------------------------------------------------------------------------

FORGED = "2026-01-01 00:00:00.000 error forged"
HOSTILE = [
    "'; DROP TABLE jobs; --",
    '" OR 1=1 --',
    "../../../../etc/passwd",
    "__import__('os').system('id')",
    "{0.__class__} %s %n {job}",
    f"x\n{FORGED}",
    f"x\r{FORGED}\x1b[2K\x1b]0;title\x07",
    f"x\u2028{FORGED}\x85{FORGED}\u202e",
    "\x00nul\x7f\x9b31m",
]


def test_nothing_of_a_job_becomes_more_than_text(tmp_path: Path) -> None:
    """Ids, arguments, exceptions and output with SQL, paths, format strings, newlines and control characters: each comes
    back as it was; no line of the log begins as one of the log's own that nobody wrote; and what the command line prints
    has nothing in it that a terminal would obey.
    """
    source = """
class T:
    def fail(self, arguments):
        print(arguments)
        raise ValueError(arguments)
"""
    with Daemon(tmp_path, source) as daemon, daemon.connect() as client:
        for text in HOSTILE:
            assert client.request(job("fail", text, id=text[:128]))["id"] == text
            assert client.request(job(text))["error"]["code"] == "unknown_target"
            assert client.request({"command": text})["error"]["code"] == "unknown_command"
            assert client.request({"command": "dead", "target": text})["result"]["total"] == 0
        daemon.wait_until(lambda status: status["jobs"]["dead"] == len(HOSTILE))
        listed = client.request({"command": "dead"})["result"]["jobs"]
        assert [(entry["id"], entry["arguments"], entry["error"]["message"]) for entry in listed] == [
            (text, text, text) for text in HOSTILE
        ]
        for text in HOSTILE:
            (found,) = client.request({"command": "dead", "id": text})["result"]["jobs"]
            assert found["arguments"] == text
        shown = [daemon.command("dead").stdout, daemon.command("status").stdout]
        shown += [daemon.command("dead", "--", text).stdout for text in HOSTILE if "\0" not in text]
        shown += [daemon.command("dead", "--json").stdout]
        for printed in shown:
            assert all(line.isprintable() for line in printed.split("\n")), printed
        for line in daemon.log.splitlines():
            assert line.startswith("    ") or re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ", line), line
            assert not line.startswith(FORGED)
            assert line.isprintable(), line
        assert sorted(path.name for path in tmp_path.iterdir() if "spool" in path.name) == sorted(
            f"spool.db{suffix}" for suffix in ("", "-shm", "-wal", ".claims", ".lock", ".stack")
        )


def test_no_id_ends_the_daemon(tmp_path: Path) -> None:
    """One that looks like the daemon's own, with a number that nothing holds: an id like any other, and answered."""
    with Daemon(tmp_path, SOURCE) as daemon, daemon.connect() as client:
        identity = client.request(job("echo"))["id"].rpartition("-")[0]
        huge = f"{identity}-{'f' * 20}"
        assert client.request({"command": "dead", "id": huge})["error"]["code"] == "not_found"
        assert client.request(job("echo", id=huge))["status"] == "accepted"
        assert client.request(job("echo", id=huge))["status"] == "duplicate"


def test_nobody_takes_the_name_of_a_later_job(tmp_path: Path) -> None:
    """An id that the daemon has yet to give is refused, alone and in an array, as is one whose job has ended without a
    trace; that of a job that runs is a duplicate. So no two dead jobs have one name.
    """
    with Daemon(tmp_path, SOURCE) as daemon, daemon.connect() as client:
        first = client.request(job("echo"))["id"]
        daemon.wait_until_done()
        prefix, _, number = first.rpartition("-")
        later = [f"{prefix}-{int(number, 16) + ahead:x}" for ahead in (1, 2, 3, 2**40)]
        for name in (first, *later):
            refused = client.request(job("fail", "thief", id=name))
            assert (refused["error"]["code"], refused["id"]) == ("bad_request", name)
            refused = client.batch([job("echo"), job("fail", "thief", id=name)])
            assert refused["error"]["message"].startswith("$[1].id: ")
        running = client.request(job("sleep", 3600))["id"]
        assert client.request(job("fail", "thief", id=running))["status"] == "duplicate"
        names = [client.request(job("fail", "own"))["id"] for _ in later]
        status = daemon.wait_until(lambda status: status["jobs"]["dead"] >= len(names))
        assert status["jobs"]["dead"] == len(names)
        for name in names:
            assert "own" in daemon.command("dead", name).stdout
