"""What each system of the comparison runs: a job that leaves its marks in a ledger, and the workers of the peers."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

JOB_SECONDS = 0.02


def mark(letter: str, number: int) -> None:
    """One line for the ledger, in one write."""
    ledger = os.open(os.environ["COMPARE_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(ledger, f"{letter} {number} {os.getpid()}\n".encode())
    os.close(ledger)


def record(number: int) -> None:
    """The job."""
    mark("begin", number)
    time.sleep(JOB_SECONDS)
    mark("end", number)


class Targets:
    """The class for workerd."""

    def record(self, arguments: int) -> None:
        record(arguments)


def beanstalkd_worker(port: int) -> None:
    """Reserve, run, delete; a job that is not deleted is given to another when the connection is gone."""
    import greenstalk

    while True:
        try:
            with greenstalk.Client(("127.0.0.1", port)) as client:
                while True:
                    job = client.reserve()
                    record(json.loads(job.body))
                    client.delete(job)
        except (OSError, greenstalk.Error):
            time.sleep(0.05)


def celery_app() -> Any:
    """The application, as its documentation says for jobs that must not be lost."""
    import celery

    broker = os.environ["COMPARE_BROKER"]
    app = celery.Celery("compare", broker=broker)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=os.environ["COMPARE_REJECT"] == "1",
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        broker_transport_options={"visibility_timeout": float(os.environ["COMPARE_VISIBILITY"])},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    app.task(name="record")(record)
    return app


if __name__ == "__main__":
    beanstalkd_worker(int(sys.argv[1]))
elif "COMPARE_BROKER" in os.environ:
    app = celery_app()
