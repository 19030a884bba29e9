"""Jobs as rows of SQLite, a batch of them in one step of one statement.

The threads of the daemon share the interpreter, and every step of a statement gives it away and must win it back.
So a batch of jobs is one step, in and out. Going in, the numbers of a row are text of fixed width, cut out of
one parameter by substr(), which on a BLOB costs the same wherever it cuts: this takes half the time of JSON for
the whole row, and bears any bytes. Coming out, the arguments of all rows are joined to one BLOB.
"""
# ruff: noqa: C408, S608 - dict() reads best for a layout; statements are made of constants, and values bound to them

from __future__ import annotations

import sqlite3
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from workerd.changes import ROW_BYTES
from workerd.job import Job, Options, State, Submitter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from workerd.changes import Burial, Snapshot

LAST_SEQ = 2**63 - 1
CHUNK = 8 * 2**20  # bytes in one statement, more or less

# Times of this century, as floats, are whole numbers of this many ticks a second, so nothing is lost: SQLite
# itself would not print a float in full.
TICKS = 2**22
NOBODY = -1  # uid and pid of a job whose submitter is not known; NULL in the table


def _layout(base: str, fields: Mapping[str, int]) -> tuple[bytes, int, dict[str, str]]:
    """The format of a record of numbers, its width, and SQL to cut each out of a blob; `base` counts from 1."""
    starts = accumulate(fields.values(), initial=0)
    cuts = {
        name: f"CAST(substr({base} + {start}, {width}) AS INT)"
        for (name, width), start in zip(fields.items(), starts, strict=False)
    }
    return b"".join(b"%%%dd" % width for width in fields.values()), sum(fields.values()), cuts


# What many jobs of a batch have in common goes into the data once, as a kind: numbers, target and options.
ROW_FORMAT, ROW_WIDTH, ROW = _layout(":rows, e.key * 42 + 1", dict(kind=11, start=11, key_size=9, size=11))
KIND_FORMAT, KIND_WIDTH, KIND = _layout(
    f":data, {ROW['kind']}",
    dict(target=9, options=9, priority=4, submitted=20, ready_at=20, state=2, attempts=9, crashes=9, uid=11, pid=11),
)
_TEXTS = f"{ROW['kind']} + {KIND_WIDTH}"
INSERT = f"""
INSERT INTO jobs (
    seq, key, target, arguments, options, priority, submitted, ready_at, state, attempts, crashes, uid, pid
) SELECT e.value, nullif(CAST(substr(:data, {ROW["start"]}, {ROW["key_size"]}) AS TEXT), ''),
    CAST(substr(:data, {_TEXTS}, {KIND["target"]}) AS TEXT),
    substr(:data, {ROW["start"]} + {ROW["key_size"]}, {ROW["size"]}),
    CAST(substr(:data, {_TEXTS} + {KIND["target"]}, {KIND["options"]}) AS TEXT), {KIND["priority"]},
    {KIND["submitted"]} / {TICKS}.0, {KIND["ready_at"]} / {TICKS}.0,
    {KIND["state"]}, {KIND["attempts"]}, {KIND["crashes"]},
    nullif({KIND["uid"]}, {NOBODY}), nullif({KIND["pid"]}, {NOBODY})
FROM json_each(:seqs) e WHERE true
"""
INSERT_NEW = INSERT + "ON CONFLICT DO NOTHING"
# the last clause: a key that another job has must not bar all later commits
UPSERT = f"""{INSERT}
ON CONFLICT (seq) DO UPDATE SET (ready_at, state, attempts, crashes)
    = (excluded.ready_at, excluded.state, excluded.attempts, excluded.crashes)
ON CONFLICT DO NOTHING
"""
LISTED = "IN (SELECT value FROM json_each(:seqs))"
SUCCEED = """
UPDATE jobs SET state = 3, ended = e.value ->> 1, arguments = NULL, error = NULL
FROM json_each(:rows) e WHERE jobs.seq = e.value ->> 0
"""
BURY = """
UPDATE jobs SET state = 4, error = substr(:errors, e.value ->> 1, e.value ->> 2), ended = e.value ->> 3
FROM json_each(:rows) e WHERE jobs.seq = e.value ->> 0
"""
LOAD = f"""
SELECT json_group_array(json_array(seq, key, target, options, CAST(submitted * {TICKS} AS INT),
        CAST(ready_at * {TICKS} AS INT), state, attempts, crashes, CAST(coalesce(ended, 0) * {TICKS} AS INT),
        coalesce(uid, {NOBODY}), coalesce(pid, {NOBODY}),
        coalesce(length(CAST(arguments AS BLOB)), 0), coalesce(length(CAST(error AS BLOB)), 0))),
    CAST(group_concat(CAST(arguments AS TEXT), '') AS BLOB), CAST(group_concat(CAST(error AS TEXT), '') AS BLOB)
FROM jobs WHERE seq {LISTED}
"""
USAGE = f"""
SELECT coalesce(uid, {NOBODY}), count(*), coalesce(sum(length(arguments)), 0) FROM jobs
WHERE {{chosen}} GROUP BY uid
"""
PEEK = "SELECT json_group_array(json_array(seq, size)) FROM (SELECT seq, length(arguments){more} AS size FROM jobs"
# The jobs of a line in their order: the ready ones, and among them those that were delayed and have joined it.
PEEK_READY = """
SELECT json_group_array(json_array(seq, size)) FROM (
    SELECT seq, ready_at, length(arguments) AS size FROM jobs
        WHERE state = 0 AND priority = :priority AND (ready_at, seq) > (:ready_at, :seq)
    UNION ALL SELECT seq, ready_at, length(arguments) AS size FROM jobs
        WHERE state = 1 AND priority = :priority AND (ready_at, seq) > (:ready_at, :seq)
            AND (ready_at, seq) <= (:until_at, :until_seq)
    ORDER BY ready_at, seq LIMIT :limit
)
"""
PEEK_SCHEDULED = f"{PEEK.format(more='')} WHERE state = 1 AND (ready_at, seq) > (?, ?) ORDER BY ready_at, seq LIMIT ?)"
PEEK_DEAD = f"""
{PEEK.format(more=" + coalesce(length(error), 0)")}
WHERE state = 4 AND seq > :after AND seq <= :upto AND {{chosen}} ORDER BY seq LIMIT :limit)
"""
# The dead of each user and target; as BLOB, because the text may be none.
COUNT_DEAD = f"""
SELECT coalesce(uid, {NOBODY}), CAST(target AS BLOB), count(*) FROM jobs WHERE state = 4 GROUP BY uid, target
"""
USAGE_DEAD = f"""
SELECT coalesce(uid, {NOBODY}), CAST(target AS BLOB), count(*), coalesce(sum(length(arguments)), 0) FROM jobs
WHERE seq {LISTED} GROUP BY uid, target
"""
# A job that the daemon had named is given that name as its key, unless a client has taken it.
REVIVE = """
UPDATE jobs SET (seq, key, ready_at, state, attempts, crashes, error, ended)
    = (n.seq, n.key, coalesce(:now, jobs.ready_at), 0, 0, 0, NULL, NULL)
FROM (
    SELECT seq AS old, :first + row_number() OVER (ORDER BY seq) - 1 AS seq, coalesce(key, (
        SELECT name FROM (SELECT :prefix || printf('%x', d.seq) AS name)
        WHERE NOT EXISTS (SELECT 1 FROM jobs o WHERE o.key = name)
    )) AS key FROM jobs d WHERE seq IN (SELECT value FROM json_each(:seqs)) ORDER BY d.seq
) n WHERE jobs.seq = n.old
"""
DELETE_DEAD = (
    f"DELETE FROM jobs WHERE key IS NULL AND seq {LISTED}",
    f"UPDATE jobs SET state = 3, ended = :now, arguments = NULL, error = NULL WHERE key IS NOT NULL AND seq {LISTED}",
)


# What reading a row raises in which a byte is wrong that SQLite knows nothing of. (Python's own complaint, that text is
# no UTF-8, is an OperationalError without a name of SQLite's.)
UNREADABLE = (sqlite3.OperationalError, msgspec.MsgspecError, ValueError, KeyError, TypeError)


def is_rotten(error: Exception) -> bool:
    """Whether one of UNREADABLE tells of a row that makes no sense, and not of the disk."""
    # SQLITE_ERROR is what it says where a blob stands for text, which no JSON can hold
    return getattr(error, "sqlite_errorname", None) in {None, "SQLITE_ERROR"}


# The row is kept as it is, and its job dead, by which it can be found.
SPOIL = (
    "CREATE TABLE IF NOT EXISTS spoiled AS SELECT * FROM jobs WHERE false",
    f"INSERT INTO spoiled SELECT * FROM jobs WHERE seq {LISTED}",
    f"""
UPDATE jobs SET state = 4, key = NULL, target = 'unreadable', options = '[]', submitted = :now, ready_at = :now,
    uid = iif(typeof(uid) = 'integer' AND uid BETWEEN 0 AND 4294967295, uid, NULL),
    pid = iif(typeof(pid) = 'integer' AND pid BETWEEN 0 AND 4294967295, pid, NULL),
    attempts = 0, crashes = 0, ended = :now, arguments = CAST('null' AS BLOB),
    error = CAST('{{"reason":"crashed","type":"DamagedSpoolError","message":"what the spool has of this job makes '
    || 'no sense; its row is in the table spoiled","traceback":""}}' AS BLOB)
WHERE seq {LISTED}
""",
)


class DeadJob(msgspec.Struct, frozen=True, gc=False):
    """A job with the error (JSON) that it died of, and when."""

    job: Job
    error: bytes
    ended: float


class DeadPage(msgspec.Struct, frozen=True):
    """Some dead jobs, in the order of their seqs, and whether more follow."""

    jobs: list[DeadJob]
    more: bool


def chosen(selection: Mapping[str, Any], seq: int | None) -> tuple[str, dict[str, Any]]:
    """A condition, and values bound to it, of: the job with the `id`, else those of the `target`, else all there are;
    of `uid`, if given, only those. `seq` is the one in the id, if the daemon gave it.
    """
    condition, values = "true", {}
    if (job_id := selection.get("id")) is not None:
        named = "SELECT seq FROM jobs WHERE key = :id UNION ALL SELECT seq FROM jobs WHERE seq = :seq AND key IS NULL"
        condition, values = f"seq IN ({named})", {"id": job_id, "seq": seq}
    elif (target := selection.get("target")) is not None:
        condition, values = "target = :target", {"target": target}
    if (uid := selection.get("uid")) is not None:
        condition, values = f"{condition} AND uid = :uid", values | {"uid": uid}
    return condition, values


def peek_dead(
    db: sqlite3.Connection, where: tuple[str, dict[str, Any]], within: tuple[int, int], limit: int, max_bytes: int
) -> tuple[list[int], bool]:
    """The first seqs of dead jobs that are `chosen`, above the one and up to the other of `within`, and whether more
    follow. The last is the one whose arguments and error pass `max_bytes`, if one does.
    """
    condition, values = where
    after, upto = within
    values = values | {"after": after, "upto": upto, "limit": limit + 1}
    found = db.execute(PEEK_DEAD.format(chosen=condition), values).fetchone()[0]
    sizes = msgspec.json.decode(found, type=list[tuple[int, int]])
    seqs = fitting(sizes, max_bytes)[:limit]
    return seqs, len(seqs) < len(sizes)


def load(db: sqlite3.Connection, seqs: Sequence[int]) -> list[DeadJob]:
    """The jobs with these seqs, in this order; raises one of UNREADABLE."""
    return unpacked(db.execute(LOAD, {"seqs": as_json(seqs)}).fetchone(), seqs)


def dead_of(uid: object, target: bytes) -> tuple[int, str]:
    """What a dead job is counted under, whatever its row says."""
    return uid if isinstance(uid, int) else NOBODY, target.decode(errors="replace")


def fitting(sizes: Sequence[tuple[int, int]], max_bytes: int) -> list[int]:
    """The first seqs of what PEEK found, (seq, bytes), up to the one that passes `max_bytes`."""
    before = accumulate((size for _, size in sizes), initial=0)
    return [seq for (seq, _), total in zip(sizes, before, strict=False) if total <= max_bytes]


def as_json(value: object) -> str:
    """The text that json_each() takes."""
    return msgspec.json.encode(value).decode()


def packed(jobs: Snapshot) -> Iterator[dict[str, object]]:
    """The parameters of INSERT and its variants; more than one set of them if the arguments are many bytes."""
    for piece in pieces([len(job.arguments) for job in jobs.jobs]):
        yield _pack(jobs[piece])


def graves(buried: Sequence[Burial]) -> Iterator[dict[str, object]]:
    """The parameters of BURY; more than one set of them if the errors are many bytes."""
    for piece in pieces([len(error) for _, error, _ in buried]):
        errors = [error for _, error, _ in buried[piece]]
        starts = accumulate([len(error) for error in errors], initial=1)
        rows = [
            (job.seq, start, len(error), ended)
            for (job, error, ended), start in zip(buried[piece], starts, strict=False)
        ]
        yield {"rows": as_json(rows), "errors": b"".join(errors)}


def listed(ends: Sequence[object]) -> Iterator[str]:
    """Rows of a few numbers each, as the texts that json_each() takes."""
    for at in range(0, len(ends), CHUNK // ROW_BYTES):
        yield as_json(ends[at : at + CHUNK // ROW_BYTES])


def pieces(sizes: Sequence[int]) -> Iterator[slice]:
    """Which rows, with so many bytes each, go into one statement, into the next and so on."""
    if sum(sizes) + len(sizes) * ROW_BYTES <= CHUNK:  # mostly
        if sizes:
            yield slice(len(sizes))
        return
    begin = total = 0
    for end, size in enumerate(sizes, 1):
        total += size + ROW_BYTES
        if total > CHUNK:
            yield slice(begin, end)
            begin, total = end, 0
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def _pack(snapshot: Snapshot) -> dict[str, object]:
    kinds: dict[tuple[object, ...], int] = {}
    data: list[bytes] = []
    numbers: list[int] = []  # of all rows, one after the other
    at = 1
    jobs = snapshot.jobs
    for job, ready_at, attempts, crashes in zip(
        jobs, snapshot.ready_at, snapshot.attempts, snapshot.crashes, strict=True
    ):
        common = (job.target, id(job.options), id(job.submitter), job.submitted, ready_at, attempts, crashes)
        kind = kinds.get(common)
        if kind is None:
            kinds[common] = kind = at
            record = _kind(job, ready_at, attempts, crashes)
            data.append(record)
            at += len(record)
        key = job.key.encode() if job.key else b""
        arguments = job.arguments
        data += (key, arguments)
        numbers += (kind, at, len(key), len(arguments))
        at += len(key) + len(arguments)
    records = ROW_FORMAT * len(jobs) % tuple(numbers)
    assert len(records) == ROW_WIDTH * len(jobs)
    return {"data": b"".join(data), "rows": records, "seqs": as_json([job.seq for job in jobs])}


def _kind(job: Job, ready_at: float, attempts: int, crashes: int) -> bytes:
    """The record of what jobs have in common; what goes on changing is given, as it was at one moment."""
    target, options = job.target.encode(), _options_text(job.options).encode()
    # What was ever delayed is scheduled on the disk until it ends, for nothing is written when its time has come.
    state = State.SCHEDULED if ready_at > job.submitted else State.READY
    uid, pid = (job.submitter.uid, job.submitter.pid) if job.submitter else (NOBODY, NOBODY)
    numbers = KIND_FORMAT % (
        len(target), len(options), job.options.priority, int(job.submitted * TICKS), int(ready_at * TICKS),
        state, attempts, crashes, uid, pid,
    )  # fmt: skip
    assert len(numbers) == KIND_WIDTH
    return numbers + target + options


def unpacked(row: tuple[str, bytes, bytes], seqs: Sequence[int]) -> list[DeadJob]:
    """The jobs of what LOAD returned, in the order of `seqs`; those that live have an empty error."""
    columns, arguments, errors = row
    found: dict[int, DeadJob] = {}
    at = error_at = 0
    for column in _columns(columns):
        seq, key, target, options, submitted, ready_at, state, attempts, crashes, ended, uid, pid, size, error_size = (
            column
        )
        job = Job(
            seq, target, arguments[at : at + size], _options(options), submitted / TICKS, ready_at / TICKS,
            _submitter(uid, pid), key, attempts, crashes, _STATES[state], stored=True,
        )  # fmt: skip
        error = errors[error_at : error_at + error_size] if error_size else b""
        found[seq] = DeadJob(job, error, ended / TICKS)
        at += size
        error_at += error_size
    if (at, error_at) != (len(arguments or b""), len(errors or b"")):
        raise ValueError("lengths that do not add up")
    return [found[seq] for seq in seqs]


_STATES = {int(state): state for state in State}  # to call State takes ten times as long
_Count = Annotated[int, msgspec.Meta(ge=0, lt=10**9)]
_Number = Annotated[int, msgspec.Meta(ge=NOBODY, lt=2**32)]
_columns = msgspec.json.Decoder(
    list[tuple[int, str | None, str, str, int, int, int, _Count, _Count, int, _Number, _Number, int, int]]
).decode


@lru_cache(maxsize=1024)
def _submitter(uid: int, pid: int) -> Submitter | None:
    return None if uid == NOBODY else Submitter(uid, pid)


@lru_cache(maxsize=1024)
def _options(text: str) -> Options:
    return msgspec.json.decode(text, type=Options)


@lru_cache(maxsize=1024)
def _options_text(options: Options) -> str:
    return as_json(options)
