"""What `huey_consumer` loads."""

from __future__ import annotations

import os

from peers.huey_ import on_redis, on_sqlite

if "HUEY_DB" in os.environ:
    huey = on_sqlite(os.environ["HUEY_DB"], durable=bool(os.environ["DURABLE"]))
else:
    huey = on_redis(os.environ["REDIS_SOCKET"])
