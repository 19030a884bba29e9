"""What `dramatiq` loads."""

from __future__ import annotations

import os

from peers.dramatiq_ import actor

broker = actor(os.environ["REDIS_SOCKET"], durable=bool(os.environ["DURABLE"])).broker
