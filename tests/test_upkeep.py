"""Spool files that are not as they should be: of an older schema, damaged, emptied, interrupted in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import ROOT, Daemon, job
from transactions import ALL, transaction

from workerd import upkeep
from workerd.changes import Counts
from workerd.claims import Claims
from workerd.errors import DamagedSpoolError, SpoolError
from workerd.job import Job, Options
from workerd.spool import Spool

PLENTY = 2**40
ERROR = b'{"reason":"failed","type":"ValueError","message":"no"}'
NOW = 1_790_000_000.5

SCHEMA_1 = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, key TEXT, target TEXT NOT NULL, options TEXT NOT NULL, priority INT NOT NULL,
    submitted REAL NOT NULL, ready_at REAL NOT NULL, state INT NOT NULL, attempts INT NOT NULL,
    crashes INT NOT NULL, ended REAL, error BLOB, arguments BLOB
);
CREATE UNIQUE INDEX keys ON jobs (key) WHERE key IS NOT NULL;
CREATE INDEX ready ON jobs (priority, seq) WHERE state = 0;
CREATE INDEX scheduled ON jobs (ready_at, seq) WHERE state = 1;
CREATE INDEX ended ON jobs (ended) WHERE state = 3;
CREATE INDEX dead ON jobs (seq) WHERE state = 4;
PRAGMA application_id = 0x776B7264;
PRAGMA user_version = 1;
INSERT INTO meta VALUES ('identity', 'abcdefghij'), ('epoch', 3);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def old(path: Path) -> Path:
    """A spool of schema 1, left by a daemon that was killed, its jobs still in the log: ready, scheduled, a known id,
    dead.
    """
    made = path.with_name("made")
    db = sqlite3.connect(made, isolation_level=None)
    db.executescript(SCHEMA_1)
    options = '[100,0.0,1,3,{"base":1.0,"cap":300.0}]'
    rows = [
        (1, None, "one", 0, None, None, b"[1]"),
        (2, "mine", "two", 0, None, None, b"\xff\0" * 9000),
        (3, None, "late", 1, None, None, b"3"),
        (4, "known", "over", 3, NOW, None, None),
        (5, None, "gone", 4, NOW, ERROR, b"5"),
    ]
    for seq, key, target, state, ended, error, arguments in rows:
        values = (seq, key, target, options, NOW, NOW + (state == 1), state, ended, error, arguments)
        db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, 100, ?, ?, ?, 0, 0, ?, ?, ?)", values)
    for suffix in ("", "-wal"):
        shutil.copy(f"{made}{suffix}", f"{path}{suffix}")
    db.close()
    path.chmod(0o600)
    return path


def beside(path: Path) -> set[str]:
    return {found.name.removeprefix(path.name) for found in path.parent.glob(f"{path.name}*")} - {"", ".lock"}


def check_migrated(path: Path) -> None:
    spool = Spool.open(path)
    try:
        assert (spool.identity, spool.first_seq >> 40) == ("abcdefghij", 4)
        assert spool.counts(NOW) == Counts({100: 2}, 1, {(-1, "gone"): 1})
        one, two = spool.refill_ready(100, ALL, ALL, 10, PLENTY)
        assert (one.seq, one.target, one.arguments, one.submitter) == (1, "one", b"[1]", None)
        assert (two.key, two.arguments, two.options) == ("mine", b"\xff\0" * 9000, Options())
        assert [job.target for job in spool.refill_scheduled((0.0, 0), 10, PLENTY)] == ["late"]
        (gone,) = spool.dead({}, 0, 10, PLENTY).jobs
        assert (gone.job.target, gone.error, gone.ended) == ("gone", ERROR, NOW)
        again = Job(spool.first_seq, "t", b"", Options(), NOW, NOW, key="known")
        assert spool.commit(transaction(keyed=[again])).new == frozenset(), "its id is still known"
        assert spool._one("PRAGMA integrity_check") == "ok"
    finally:
        spool.close()


def test_an_older_schema_is_brought_up_to_date_and_kept(old: Path) -> None:
    """All jobs are there, under the same identity; the old file lies beside it, whole, for an older version to open."""
    check_migrated(old)
    kept = old.with_name("spool.db.schema-1")
    with sqlite3.connect(kept) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*), sum(length(arguments)) FROM jobs").fetchone() == (5, 18005)
    db.close()
    assert kept.stat().st_mode & 0o777 == old.stat().st_mode & 0o777
    check = Spool.open(old)
    check.close()
    assert beside(old) & {".schema-1", ".schema-1-2", ".new"} == {".schema-1"}


def test_a_migration_that_is_interrupted_anywhere_is_begun_again(old: Path, tmp_path: Path) -> None:
    """SIGKILL at each system call that changes a file: the next opening finds the old spool or the new one, whole."""
    folder = tmp_path / "tried"
    calls = "unlink,unlinkat,link,linkat,rename,renameat,renameat2,fsync,fdatasync,ftruncate"
    program = "import sys; from pathlib import Path; from workerd.spool import Spool; Spool.open(Path(sys.argv[1]))"
    killed = 0
    for number in range(1, 200):
        folder.mkdir()
        for name in ("spool.db", "spool.db-wal"):
            shutil.copy(old.with_name(name), folder)
        command = ["strace", "-qq", "-f", "-o", "/dev/null", f"-einject={calls}:signal=SIGKILL:when={number}"]
        run = subprocess.run(
            [*command, sys.executable, "-c", program, folder / "spool.db"],
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        check_migrated_or_done(folder / "spool.db")
        shutil.rmtree(folder)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        killed += 1
    assert run.returncode == 0
    assert killed >= 8


def check_migrated_or_done(path: Path) -> None:
    spool = Spool.open(path)
    assert spool.counts(NOW) == Counts({100: 2}, 1, {(-1, "gone"): 1})
    spool.close()
    assert path.with_name("spool.db.schema-1").exists()


def test_a_migration_without_room_changes_nothing(old: Path) -> None:
    """Where the new file cannot be written, the old one stays as it was, and the message names it."""
    old.with_name("spool.db.new").mkdir()
    with pytest.raises(SpoolError, match=r"spool\.db"):
        Spool.open(old)
    old.with_name("spool.db.new").rmdir()
    check_migrated(old)


def used_spool(path: Path, jobs: int = 2000) -> None:
    """A spool that a daemon has used, with ready jobs in it."""
    spool = Spool.open(path)
    seqs = range(spool.first_seq, spool.first_seq + jobs)
    spool.commit(transaction(inserts=[Job(seq, "target", b"[%d]" % 10**99, Options(), NOW, NOW) for seq in seqs]))
    spool.close()
    os.close(Claims.open(path.with_name("spool.db.claims")).fd)


def overwrite(path: Path, begin: int, end: int) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xa5" * (end - begin))


@pytest.mark.parametrize(("begin", "end"), [(0, 100), (0, 4096), (100, 200), (4096, 40960)])
def test_a_damaged_spool_is_put_aside_when_it_is_opened(
    path: Path, begin: int, end: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Header, schema or first tables overwritten: the damaged file is beside the new one, byte for byte, and the log
    says which it is.
    """
    used_spool(path)
    overwrite(path, begin, end)
    damaged = path.read_bytes()
    spool = Spool.open(path)
    try:
        assert spool.counts(NOW) == Counts({}, 0, {})
        assert spool.quarantined == 1
    finally:
        spool.close()
    assert path.with_name("spool.db.damaged").read_bytes() == damaged
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "spool.db is damaged" in record.getMessage()
    assert f"put aside as {path}.damaged " in record.getMessage()


def test_damage_that_is_met_later_puts_the_spool_aside_at_the_next_opening(path: Path) -> None:
    """A page of jobs that makes no sense: told when it is read; the next opening does not go on with such a file. A
    second damaged spool does not take the place of the first.
    """
    for number in range(1, 3):
        used_spool(path)
        spool = Spool.open(path)
        spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        overwrite(path, 200 * 1024, 300 * 1024)
        spool._db.execute("PRAGMA cache_size = 0")
        with pytest.raises(DamagedSpoolError, match="damaged; at the next start it is examined"):
            spool.refill_ready(100, ALL, ALL, 2000, PLENTY)
        spool.close()
        spool = Spool.open(path)
        assert (spool.counts(NOW), spool.quarantined) == (Counts({}, 0, {}), number)
        spool.close()
    assert {".damaged", ".damaged-2"} <= beside(path)


def test_a_spool_that_somebody_emptied_is_not_taken_for_a_new_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Zero bytes where jobs were: that is told as damage, since nothing of workerd's leaves such a file."""
    used_spool(path)
    os.truncate(path, 0)
    spool = Spool.open(path)
    assert spool.quarantined == 1
    spool.close()
    assert "empty, although it has been used" in caplog.text


def test_the_daemon_goes_on_with_a_new_spool_and_says_so(tmp_path: Path) -> None:
    """Damage that a running daemon meets: it stops with status 70, so that systemd starts it again; then it takes jobs,
    and STATUS, the log and a metric tell of the file that was put aside.
    """
    source = """
class T:
    def echo(self, arguments): return arguments
    def fail(self, arguments): raise ValueError("no")
"""
    with Daemon(tmp_path, source) as daemon:
        with daemon.connect() as client:
            client.pipeline(job("fail", "x" * 1000) for _ in range(2000))
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 2000)
        daemon.restart()
        spool = tmp_path / "spool.db"
        overwrite(spool, 4096 * 100, spool.stat().st_size)
        assert daemon.request({"command": "dead", "limit": 1000})["error"]["code"] == "spool_failed"
        assert daemon.wait() == 70
        daemon.start()
        assert daemon.run("echo", 1)["result"] == 1
        assert "workerd_spool_quarantined 1.0" in daemon.scrape()
        told = [message["STATUS"] for message in daemon.notifications.messages if "STATUS" in message]
        assert "(1 damaged spool put aside)" in told[-1]
        assert f"put aside as {spool}.damaged" in daemon.log
        assert Path(f"{spool}.damaged").stat().st_size > 2_000_000
        daemon.restart()
        assert daemon.status()["jobs"]["dead"] == 0


def test_a_daemon_that_finds_damage_as_it_starts_starts_all_the_same(tmp_path: Path) -> None:
    """All of the file but its header overwritten between two runs: the daemon is ready, with a new spool."""
    with Daemon(tmp_path, "class T:\n    def echo(self, arguments): return arguments\n") as daemon:
        with daemon.connect() as client:
            client.pipeline(job("echo", "x" * 1000, delay=3600) for _ in range(500))
        daemon.stop()
        spool = tmp_path / "spool.db"
        overwrite(spool, 4096, spool.stat().st_size)
        daemon.start()
        assert daemon.run("echo", 1)["result"] == 1
        assert Path(f"{spool}.damaged").exists()


def test_a_link_leads_to_the_file_and_what_is_beside_it(old: Path, tmp_path: Path) -> None:
    """`[spool] path` may be a symbolic link to another disk: all is kept there, and the link stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for suffix in ("", "-wal"):
        shutil.move(f"{old}{suffix}", disk)
    old.symlink_to(disk / "spool.db")
    source = "class T:\n    def one(self, arguments): pass\n    two = late = over = gone = one\n"
    with Daemon(tmp_path, source) as daemon:
        daemon.wait_until(lambda status: not status["jobs"]["ready"])
    assert old.is_symlink()
    assert {path.name for path in disk.iterdir()} >= {
        "spool.db",
        "spool.db.schema-1",
        "spool.db.claims",
        "spool.db.lock",
    }
    assert beside(old) == set()


def test_a_rotten_row_does_not_hold_up_its_line(tmp_path: Path) -> None:
    """Found by a daemon that reads its backlog: one job is dead, and says why; all others run, and the numbers are right."""
    source = "class T:\n    def echo(self, arguments): return arguments\n"
    with Daemon(tmp_path, source) as daemon:
        daemon.request(
            [job("echo", number, delay=0.2) for number in range(300)] + [job("echo", {"later": 1}, delay=3600)]
        )
        daemon.kill()
        db = sqlite3.connect(tmp_path / "spool.db")
        db.execute("UPDATE jobs SET options = 'x' WHERE seq = (SELECT min(seq) + 100 FROM jobs)")
        db.execute("UPDATE jobs SET arguments = CAST(x'ff22' AS BLOB) WHERE seq = (SELECT min(seq) + 200 FROM jobs)")
        db.commit()
        db.close()
        daemon.start()
        status = daemon.wait_until(lambda status: not status["jobs"]["ready"] and status["jobs"]["scheduled"] == 1)
        assert status["jobs"]["dead"] == 2
        assert status["targets"]["echo"]["succeeded"] == 298
        listed = daemon.request({"command": "dead"})["result"]["jobs"]
        assert [(found["target"], found["arguments"]) for found in listed] == [("unreadable", None), ("echo", '\\xff"')]
        assert "1 jobs are dead, since what the spool has of them makes no sense" in daemon.log
        assert daemon.run("echo", 1)["result"] == 1


# --- export -----------------------------------------------------------------------------------------------


def export(path: Path, *arguments: str) -> tuple[int, list[dict[str, object]], str]:
    command = [sys.executable, "-m", "workerd", "export", *arguments, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_jobs_of_a_damaged_spool_are_saved(path: Path) -> None:
    """Pages overwritten in two places: all jobs but those in the damage are told, as lines that can be submitted."""
    used_spool(path, 20_000)
    overwrite(path, 4096 * 400, 4096 * 410)
    overwrite(path, 4096 * 900, 4096 * 905)
    status, jobs, said = export(path)
    assert status == 1
    assert 19_000 < len(jobs) < 20_000
    told = {int(str(found["id"]).rpartition("-")[2], 16) for found in jobs}
    readable = sum(readable_by_itself(path, seq) for seq in range(min(told), max(told) + 1))
    assert len(jobs) == readable, "all that can be read are told"
    assert len({str(found["id"]) for found in jobs}) == len(jobs)
    assert said.startswith(f"workerd: {len(jobs):,} jobs\n")
    assert 1 <= said.count("cannot be read") <= 15


def readable_by_itself(path: Path, seq: int) -> bool:
    db = sqlite3.connect(path)
    try:
        sql = "SELECT seq, key, target, options, ready_at, arguments FROM jobs NOT INDEXED WHERE seq = ?"
        return db.execute(sql, (seq,)).fetchone() is not None
    except sqlite3.DatabaseError:
        return False
    finally:
        db.close()


def test_jobs_of_two_spools_without_names_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Where the beginning of a spool's own ids cannot be read, its jobs have others, the same at each export; those of
    a second such spool are not answered `duplicate`, and so lost.
    """
    ids = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        with Daemon(folder, "class T:\n    def t(self, a): pass\n") as daemon:
            daemon.request(job("t", "the same", delay=1e6))
            daemon.stop()
        with contextlib.closing(sqlite3.connect(folder / "spool.db")) as db:
            db.execute("DELETE FROM meta WHERE name = 'identity'")
            db.commit()
        status, jobs, said = export(folder / "spool.db")
        assert (status, len(jobs)) == (0, 1)
        assert "have new ones" in said
        assert export(folder / "spool.db")[1][0]["id"] == jobs[0]["id"]
        ids.append(jobs[0]["id"])
    assert ids[0] != ids[1]


def test_an_export_can_be_submitted(tmp_path: Path) -> None:
    """Exported from a spool that was put aside and submitted: ids, options, delays and arguments are what they were, and
    submitting it again runs nothing twice.
    """
    source = """
class T:
    def echo(self, arguments): return arguments
    def fail(self, arguments): raise ValueError(arguments)
"""
    with Daemon(tmp_path, source) as daemon:
        text = b'{"target": "echo", "arguments": {"n": 1e400, "t": "\\u00e9\xc3\xa9"}, "delay": 3600, "timeout": 9.5}\n'
        first = daemon.connect().request(text)["id"]
        daemon.request(job("echo", [1, 2], id="own", delay=7200, priority=7, backoff={"base": 2, "cap": 9}))
        daemon.request(job("fail", "x", id="dead"))
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 1)
        daemon.stop()
        aside = tmp_path / "aside.db"
        (tmp_path / "spool.db").rename(aside)
        (tmp_path / "spool.db.claims").unlink()
        status, jobs, said = export(aside)
        assert (status, said) == (0, "workerd: 2 jobs\n")
        assert [found["id"] for found in jobs] == [first, "own"]
        assert (jobs[0]["timeout"], jobs[1]["priority"], jobs[1]["backoff"]) == (9.5, 7, {"base": 2.0, "cap": 9.0})
        assert 7000 < float(str(jobs[1]["delay"])) < 7200
        assert [found["id"] for found in export(aside, "--dead")[1]] == ["dead"]
        daemon.start()
        lines = tmp_path / "jobs.ndjson"
        lines.write_text(daemon.command("export", str(aside)).stdout)
        for counted in ("2 accepted", "2 duplicate"):
            assert counted in daemon.command("submit", "--file", str(lines)).stdout
        assert "2 duplicate" in daemon.command("submit", "--file", str(lines)).stdout
        db = sqlite3.connect(tmp_path / "spool.db")
        assert db.execute("SELECT arguments FROM jobs WHERE key = ?", (first,)).fetchone() == (
            b'{"n": 1e400, "t": "\\u00e9\xc3\xa9"}',
        )
        db.close()


def test_an_export_is_harmless_on_a_terminal(path: Path) -> None:
    """It is there to be looked at: what is not printable is an escape, which says the same."""
    evil = "\x7f\u009b2J\u202e\u200b\U000e0041"
    spool = Spool.open(path)
    spool.commit(
        transaction(keyed=[Job(spool.first_seq, "target", f'[1,\t"{evil}"]\r'.encode(), Options(), NOW, NOW, key=evil)])
    )
    spool.close()
    told = subprocess.run(
        [sys.executable, "-m", "workerd", "export", str(path)], capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert told.removesuffix("\n").isprintable()
    assert [json.loads(told)[name] for name in ("id", "arguments")] == [evil, [1, evil]]


def test_what_is_no_spool_is_not_exported(tmp_path: Path, path: Path, old: Path) -> None:
    """A missing file, another file, another program's database: one line each. An older spool is read as it is."""
    (tmp_path / "text").write_text("hello\n" * 1000)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE jobs (seq)")
    other.close()
    for name in ("missing", "text", "other.db"):
        status, jobs, said = export(tmp_path / name)
        assert (status, jobs, said.count("\n")) == (1, [], 1)
    status, jobs, _ = export(old)
    assert [found["target"] for found in jobs] == ["one", "late"]
    assert status == 1, "the arguments of the third are no JSON"


def test_a_log_without_its_file_is_kept(path: Path) -> None:
    """Where somebody removed the main file, SQLite would delete the log, with acknowledged jobs in it."""
    spool = Spool.open(path)
    spool.commit(transaction(inserts=[Job(spool.first_seq, "target", b"1", Options(), NOW, NOW)]))
    log = path.with_name("spool.db-wal").read_bytes()
    path.unlink()
    spool.close()
    path.with_name("spool.db-wal").write_bytes(log)
    path.unlink(missing_ok=True)
    spool = Spool.open(path)
    spool.close()
    assert path.with_name("spool.db.damaged-wal").read_bytes() == log


def test_a_spool_is_put_aside_whole_when_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death between the two renames: the next opening goes on, and does not take the file for whole without its log."""
    spool = Spool.open(tmp_path / "one.db")
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    spool.commit(transaction(inserts=[Job(spool.first_seq, "echo", b"1", Options(), NOW, NOW)]))
    path = tmp_path / "two.db"
    for suffix in ("", "-wal"):  # as a daemon that was killed leaves it
        shutil.copy(f"{tmp_path / 'one.db'}{suffix}", f"{path}{suffix}")
    spool.close()
    real = Path.rename
    renamed: list[Path] = []

    def rename(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            upkeep.put_aside(path, "a test")
    path.with_name("two.db.suspect").write_text("as it was before put_aside\n")
    again = Spool.open(path)
    jobs, aside = again.counts(NOW).ready, again.quarantined
    again.close()
    assert jobs or aside, "the job was neither kept nor told of as put aside"
