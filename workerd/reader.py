"""Reads dead jobs for clients, on a thread of its own: however many lists there are, the writer's commits go on.

What is listed is what is committed. Of who has just died that is not so yet; a list waits for those that it might show.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from workerd.errors import DamagedSpoolError, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workerd.changes import Dead
    from workerd.deadcounts import DeadCounts
    from workerd.rows import DeadPage
    from workerd.spool import Spool
    from workerd.view import View
    from workerd.writer import Writer

T = TypeVar("T")
Asked = tuple[int, int, int]  # after which seq, how many jobs, how many bytes: see Spool.dead

# All threads share the interpreter, and a host its processors: to list without end would still slow others down. At a
# hundredth of the time, fewer than one in a hundred of the others' acknowledgements meets a list.
REST = 99  # times what a list took, until the next of those that are paced
LONGEST_REST = 0.5  # seconds


class Reader:
    """See the module. `counts` knows who has died, and is told of rows that make no sense."""

    def __init__(self, writer: Writer, counts: DeadCounts) -> None:
        self.on_failure: Callable[[str], None] = lambda _why: None  # the spool is damaged
        self._writer = writer
        self._counts = counts
        self._view = writer.spool.view()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "reader")
        self._written: dict[int | None, int] = {}  # of how many deaths (by uid; None: all) it is known that they are
        self._pace = asyncio.Lock()
        self._not_before = 0.0  # loop time
        self._closed = False

    async def page(
        self,
        selection: Mapping[str, Any],
        asked: Asked,
        render: Callable[[DeadPage], T],
        *,
        paced: bool,
    ) -> T:
        """What `render` makes of a page of dead jobs, on the thread. `paced`: such lists take a hundredth of the
        time, or little more, all of them together. Raises SpoolError.
        """
        if self._view is not None:
            await self._await_deaths(selection.get("uid"))
        if not paced:
            return await self._page(selection, asked, render)
        async with self._pace:
            await asyncio.sleep(self._not_before - self._loop.time())
            began = self._loop.time()
            try:
                return await self._page(selection, asked, render)
            finally:
                now = self._loop.time()
                self._not_before = now + min(LONGEST_REST, REST * (now - began))

    async def _page(self, selection: Mapping[str, Any], asked: Asked, render: Callable[[DeadPage], T]) -> T:
        if self._closed:
            raise SpoolError("the daemon is stopping; ask the next one")
        if self._view is not None:
            try:
                found = await self._loop.run_in_executor(self._thread, _read, self._view, selection, asked, render)
            except DamagedSpoolError as error:
                self.on_failure(str(error))
                raise
            if found is not None:
                return found[0]

        def mend(spool: Spool) -> tuple[DeadPage, Dead]:
            return spool.dead(selection, *asked), spool.take_spoiled()

        page, spoiled = await self._writer.call(mend)
        self._counts.add(spoiled)
        return render(page)

    async def _await_deaths(self, uid: int | None) -> None:
        """Whoever of the user's has died by now is written, or the disk refuses."""
        deaths = self._counts.deaths(uid)
        if deaths > self._written.get(uid, 0):
            await self._writer.call(lambda _spool: None)
            if not self._writer.failing:
                self._written[uid] = deaths

    async def close(self) -> None:
        """End the reads that are under way, and the connection: before the spool is closed."""
        self._closed = True
        if self._view is not None:
            await self._loop.run_in_executor(self._thread, self._view.close)
        self._thread.shutdown()


def _read(view: View, selection: Mapping[str, Any], asked: Asked, render: Callable[[DeadPage], T]) -> tuple[T] | None:
    page = view.dead(selection, *asked)
    return None if page is None else (render(page),)
