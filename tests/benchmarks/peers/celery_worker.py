"""What `celery worker` loads."""

from __future__ import annotations

import os

from peers.celery_ import application

app = application(os.environ["REDIS_SOCKET"], durable=bool(os.environ["DURABLE"]))
