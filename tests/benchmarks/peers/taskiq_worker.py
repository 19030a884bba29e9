"""What `taskiq worker` loads."""

from __future__ import annotations

import os

from peers import taskiq_

broker = taskiq_.broker(os.environ["REDIS_SOCKET"], durable=bool(os.environ["DURABLE"]))
