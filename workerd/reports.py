"""`workerd status`, `workerd dead` and `workerd check`: the daemon's answers, laid out."""

from __future__ import annotations

import contextlib
import pwd
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from workerd.errors import Code, Exit, Refusal
from workerd.terminal import (
    complain,
    count,
    duration,
    is_terminal,
    json_text,
    moment,
    print_fields,
    print_heading,
    print_table,
    safe,
    safe_lines,
    size,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workerd.client import Client

PAGE = 1000  # dead jobs that the daemon is asked for at once


def print_json(value: Any) -> None:
    """For programs: one line. For a person: indented."""
    print(json_text(msgspec.json.encode(value), pretty=is_terminal()))


def print_status(status: dict[str, Any]) -> None:
    """STATUS, as protocol.md describes it."""
    jobs, workers, spool = status["jobs"], status["workers"], status["spool"]
    since = f"up {duration(status['uptime'])}, pid {status['pid']}, generation {status['generation']}"
    oldest = status["oldest_ready"]
    waiting = f", the oldest for {duration(time.time() - oldest)}" if oldest is not None else ""
    queued = f"{count(jobs['running'])} running, {count(jobs['ready'])} ready{waiting}"
    queued += f", {count(jobs['scheduled'])} scheduled"
    print_fields(
        [
            ("workerd", safe(f"{status['version']}, {status['state']}, {since}")),
            ("config", safe(status["config"])),
            ("socket", safe(status["socket"])),
            *([("metrics", safe(status["metrics"]))] if status.get("metrics") else []),
            ("spool", safe(f"{spool['path']}, {size(spool['bytes'])}") if spool["path"] else "in memory only"),
            ("jobs", f"{queued}, {count(jobs['dead'])} dead"),
            ("workers", _workers(workers)),
        ]
    )
    if spool["failing"]:
        complain(f"the spool cannot be written, so no job is accepted: {spool['failing']}")
    _print_targets(status["targets"])
    _print_processes(status["processes"])
    if rejected := {code: number for code, number in status["rejected"].items() if number}:
        print_heading("Refused requests")
        print_table(("Code", "Count"), [(safe(code), count(n)) for code, n in sorted(rejected.items())], right=[1])


def _workers(workers: dict[str, int]) -> str:
    states = ", ".join(
        f"{workers[state]} {state}" for state in ("starting", "idle", "busy", "retiring") if workers[state]
    )
    return f"{workers['wanted']} wanted: {states or 'none is there'}"


def _print_targets(targets: dict[str, dict[str, int]]) -> None:
    if not targets:
        return
    print_heading("Targets")
    columns = ("submitted", "succeeded", "retried", "dead")
    rows = [(safe(name), *(count(numbers[column]) for column in columns)) for name, numbers in sorted(targets.items())]
    print_table(("Target", *(column.title() for column in columns)), rows, right=[1, 2, 3, 4])


def _print_processes(processes: list[dict[str, Any]]) -> None:
    if not processes:
        return
    print_heading("Workers")
    headers = ("Worker", "Pid", "State", "Generation", "Finished", "Running for", "Target", "Job")
    rows = []
    for process in sorted(processes, key=lambda process: int(process["worker"])):
        running = "" if process["running_for"] is None else duration(process["running_for"])
        numbers = (str(process["worker"]), str(process["pid"] or ""))
        what = (safe(process["target"] or ""), safe(process["job"] or ""))
        rows.append(
            (*numbers, safe(process["state"]), str(process["generation"]), count(process["finished"]), running, *what)
        )
    print_table(headers, rows, right=[0, 1, 3, 4, 5], wide=7)


# --- dead jobs --------------------------------------------------------------------------------------------


def dead_pages(client: Client, target: str | None, limit: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The dead jobs, page by page, `limit` of them (0: all), and how many there are."""
    left = limit or None
    after: dict[str, Any] = {}
    chosen = {} if target is None else {"target": target}
    while True:
        wanted = PAGE if left is None else min(left, PAGE)
        page = client.command("dead", limit=wanted, **chosen, **after)
        yield page["jobs"], page["total"]
        if left is not None:
            left -= len(page["jobs"])
        if page["next"] is None or not page["jobs"] or left == 0:
            return
        after = {"after": page["next"]}


def print_dead(client: Client, target: str | None, limit: int, *, as_json: bool) -> None:
    """A line for each dead job; with `as_json` one JSON object a line."""
    shown = total = 0
    for jobs, total_now in dead_pages(client, target, limit):
        shown += len(jobs)
        total = total_now
        if as_json:
            for job in jobs:
                print(json_text(msgspec.json.encode(job)))
        elif jobs:
            print_table(
                ("Id", "Target", "Ended", "Attempts", "Crashes", "Reason", "Error"),
                map(_dead_row, jobs),
                right=[3, 4],
                wide=6,
            )
    if as_json:
        return
    if not shown:
        print("There are no dead jobs." if target is None else f"There are no dead jobs of {safe(target)}.")
    elif shown < total:
        print(f"\n{count(shown)} of {count(total, 'dead job')}; --limit 0 shows all.")


def _dead_row(job: dict[str, Any]) -> tuple[str, ...]:
    error = job["error"]
    first = str(error.get("message", "")).strip().split("\n")[0]
    text = ": ".join(part for part in (str(error.get("type", "")), first) if part)
    return (
        safe(job["id"]),
        safe(job["target"]),
        moment(job["ended"]),
        count(job["attempts"]),
        count(job["crashes"]),
        safe(str(error.get("reason", ""))),
        safe(text),
    )


def print_dead_job(job: dict[str, Any]) -> None:
    """All that is known of one dead job, with its traceback."""
    error = job["error"]
    print_fields(
        [
            ("id", safe(job["id"])),
            ("target", safe(job["target"])),
            ("arguments", json_text(msgspec.json.encode(job["arguments"]))),
            ("submitted", f"{moment(job['submitted'])}{_submitter(job)}"),
            ("ended", moment(job["ended"])),
            ("attempts", count(job["attempts"])),
            ("crashes", count(job["crashes"])),
            ("reason", safe(str(error.get("reason", "")))),
            ("error", safe(": ".join(part for part in (error.get("type"), error.get("message")) if part))),
        ]
    )
    if error.get("traceback"):
        print()
        for line in safe_lines(error["traceback"]):
            print(f"    {line}")


def _submitter(job: dict[str, Any]) -> str:
    uid, pid = job.get("uid"), job.get("pid")
    if uid is None:
        return ""
    name = str(uid)
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
    return f" by {name} (pid {pid})"


def show_dead(client: Client, ids: Sequence[str], *, as_json: bool) -> Exit:
    """Show some dead jobs. Raises Refusal for an id that none of them has."""
    # an older version let a client take the name of a later job: then there are two
    for place, job in enumerate(job for job_id in ids for job in client.command("dead", id=job_id)["jobs"]):
        if as_json:
            print(json_text(msgspec.json.encode(job)))
        else:
            if place:
                print()
            print_dead_job(job)
    return Exit.OK


def act_on_dead(client: Client, action: Literal["retry", "delete"], selections: Iterable[dict[str, Any]]) -> Exit:
    """Retry or delete what is selected, and say how many there were. An id that no dead job has is no obstacle."""
    done, status = 0, Exit.OK
    for selection in selections:
        try:
            result = client.command("dead", action=action, **selection)
        except Refusal as refusal:
            if refusal.code != Code.NOT_FOUND:
                raise
            complain(str(refusal))
            status = Exit.FAILED
        else:
            done += result["retried" if action == "retry" else "deleted"]
    print(f"{count(done, 'job')} {'will run again' if action == 'retry' else 'deleted'}")
    return status


# --- targets ----------------------------------------------------------------------------------------------


def print_targets(targets: Sequence[Any]) -> None:
    """Name, parameters and first line of the docstring of each."""
    print_table(("Target", "Description"), _target_rows(targets), wide=1)


def _target_rows(targets: Sequence[Any]) -> Iterable[tuple[str, ...]]:
    for target in targets:
        signature = target.signature
        for own in ("(self, ", "(self)"):
            signature = signature.replace(own, "(" if own.endswith(" ") else "()", 1)
        doc = target.doc.strip().split("\n")[0]
        yield safe(f"{target.name}{signature}"), safe(doc)
