"""`workerd submit`: one job from the arguments, or the lines of a file with a progress bar and a summary."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workerd.client import Client, JobError
from workerd.errors import Exit, UnavailableError, WorkerdError
from workerd.lines import FileLines
from workerd.pipeline import Pipeline
from workerd.terminal import complain, console, count, duration, is_terminal, json_text, safe, safe_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workerd.replies import Summary

REFRESH = 0.1  # seconds between two looks of the progress bar
ANSWER_TIMEOUT = 300.0  # seconds; a disk may be slow, and here somebody is watching who can interrupt


def submit_one(socket: str, target: str, arguments: Any, options: dict[str, Any], *, wait: bool) -> Exit:
    """Submit a job and print its id; or wait for its end and print its result. Raises WorkerdError."""
    with Client(socket) as client:
        if wait:
            options = {**options, "reply": "result"}
        job_id, new = client.offer(target, arguments, **options)
        if not wait:
            print(safe(job_id))
        if not new:
            complain(f"job {job_id} was submitted before, and is not run again")
            return Exit.FAILED if wait else Exit.OK
        return _await(client, job_id) if wait else Exit.OK


def _await(client: Client, job_id: str) -> Exit:
    try:
        reply = client.wait(job_id)
    except UnavailableError as error:
        raise UnavailableError(f"{error}; job {job_id} is accepted, but its result is lost") from None
    except KeyboardInterrupt:
        complain(f"job {job_id} goes on")
        raise
    if reply.status == "succeeded":
        print(json_text(bytes(reply.result), pretty=is_terminal()))
        return Exit.OK
    death = JobError(reply)
    complain(str(death))
    if death.failure.traceback:
        for line in safe_lines(death.failure.traceback):
            print(f"    {line}", file=sys.stderr)
    return Exit.FAILED


def submit_file(socket: str, name: str, *, wait: bool, reconnect: float) -> Exit:
    """Submit every line of a file (`-`: standard input). Raises WorkerdError."""
    fd = _open(name)
    try:
        lines = FileLines(fd, wait=wait)
        with _progress(fd, lines, wait=wait) as (on_progress, on_notice):
            pipeline = Pipeline(
                socket,
                lines,
                wait=wait,
                timeout=ANSWER_TIMEOUT,
                reconnect=reconnect,
                on_progress=on_progress,
                on_notice=on_notice,
            )
            trouble: BaseException | None = None
            try:
                pipeline.run()
            except (WorkerdError, KeyboardInterrupt) as error:
                trouble = error
    finally:
        if fd != 0:
            os.close(fd)
    summary = pipeline.summary
    _print_summary(summary, wait=wait)
    if trouble:
        if not lines.ended:
            complain(f"line {lines.next} and those after it were not read")
        raise trouble
    return Exit.OK if summary.complete else Exit.FAILED


def _open(name: str) -> int:
    if name == "-":
        return 0
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WorkerdError(
            f"{name}: the file cannot be opened: {error.strerror}; name another, or - for standard input"
        ) from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise WorkerdError(f"{name}: is a directory; name a file with one job a line")
    return fd


def _print_summary(summary: Summary, *, wait: bool) -> None:
    rate = f", {summary.answered / summary.seconds:,.0f} jobs/s" if summary.seconds and not wait else ""
    parts = [f"{count(summary.accepted)} accepted", f"{count(summary.duplicates)} duplicates"]
    parts.append(f"{count(summary.refused)} refused")
    if summary.unacknowledged:
        parts.append(f"{count(len(summary.unacknowledged))} unacknowledged")
    if summary.unsent:
        parts.append(f"{count(summary.unsent)} not sent")
    if wait:
        parts += [f"{count(summary.succeeded)} succeeded", f"{count(summary.dead)} dead"]
    sys.stderr.flush()
    print(f"{', '.join(parts)} in {duration(summary.seconds)}{rate}", flush=True)
    for number, failure in summary.refusals:
        complain(f"line {number}: {failure.line()}")
    if (more := summary.refused - len(summary.refusals)) > 0:
        complain(f"... and {count(more, 'line')} more refused")
    for reply in summary.deaths:
        complain(str(JobError(reply)))
    if (more := summary.dead - len(summary.deaths)) > 0:
        complain(f"... and {count(more, 'job')} more dead; see `workerd dead`")
    if summary.unacknowledged:
        complain(
            f"{count(len(summary.unacknowledged), 'job')} ({_ranges(summary.unacknowledged)}) may have been "
            f'accepted or not: {summary.trouble}; with an "id" in each job they could be sent again safely'
        )
    if summary.results_lost:
        complain(
            f"{count(summary.results_lost, 'result')} lost with the connection; those jobs are accepted, and will "
            f"run where they have not; `workerd dead` lists those that fail"
        )


def _ranges(numbers: list[int], limit: int = 5) -> str:
    """`lines 3-7, 9`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges[:limit]]
    more = ", ..." if len(ranges) > limit else ""
    return f"line{'' if len(numbers) == 1 else 's'} {', '.join(texts)}{more}"


Hooks = tuple["Callable[[Summary], None] | None", "Callable[[str], None]"]


@contextmanager
def _progress(fd: int, lines: FileLines, *, wait: bool) -> Iterator[Hooks]:
    """A bar on standard error, where that is a terminal; the hooks for the pipeline."""
    if not is_terminal(err=True):
        yield None, complain
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    found = os.fstat(fd)
    total = found.st_size if stat.S_ISREG(found.st_mode) else None
    columns = (
        SpinnerColumn(finished_text=" "),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[what]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(err=True), transient=True, expand=True) as progress:
        task = progress.add_task("", total=total, what="")
        began = time.monotonic()
        shown = 0.0

        def on_progress(summary: Summary) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown < REFRESH:
                return
            shown = now
            if wait and lines.ended:
                done = summary.succeeded + summary.dead
                what = f"{count(done)} of {count(summary.accepted, 'job')} ended"
                progress.update(task, completed=done, total=summary.accepted, what=what)
                return
            rate = summary.answered / max(now - began, 0.001)
            what = f"{count(summary.answered, 'job')}, {rate:,.0f}/s"
            progress.update(task, completed=lines.taken, total=total, what=what)

        def on_notice(text: str) -> None:
            progress.console.print(Text(f"workerd: {safe(text)}"))

        yield on_progress, on_notice
