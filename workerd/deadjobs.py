"""The command `dead`: lists dead jobs, makes them ready again, deletes them.

Lists are read beside the writer. The others change the spool a piece at a time, and what others have sent is stored
between two pieces. Each deals with the jobs that were dead when its turn came, not with those that die meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
from msgspec import structs

from workerd import clock, protocol
from workerd.errors import Code, SpoolError, shown
from workerd.spool import PIECE_JOBS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workerd.access import Peer
    from workerd.admission import Admission
    from workerd.engine import Engine
    from workerd.reader import Reader
    from workerd.rows import DeadJob, DeadPage
    from workerd.session import Reply, Session
    from workerd.spool import Piece

PAGE_BYTES = 4 * 2**20  # of arguments and errors, after which a page of dead jobs ends


class DeadJobs:
    """See the module."""

    def __init__(self, engine: Engine, admission: Admission, reader: Reader) -> None:
        self.engine = engine
        self.admission = admission
        self.reader = reader
        self._orders: WeakKeyDictionary[Session, asyncio.Lock] = WeakKeyDictionary()  # one client's, one after another
        self._lists: defaultdict[int, asyncio.Lock] = defaultdict(
            asyncio.Lock
        )  # by uid: one list of each user at a time
        self._change = asyncio.Lock()  # one change at a time

    async def answer(self, request: protocol.Dead, reply: Reply) -> None:
        """Do what is asked, and complete the reply. The client may do that."""
        session = reply.session
        order = self._orders.setdefault(session, asyncio.Lock())
        turn = self._lists[session.peer.uid] if request.action == "list" else self._change
        actions = {"list": self._list, "retry": self._retry, "delete": self._delete}
        try:
            async with order, turn:
                if session.gone():
                    return
                result = await actions[request.action](request, session.peer)
        except Exception as error:
            reply.complete(protocol.refusal(Code.SPOOL_FAILED, str(error)))  # a client must not wait for ever
            if not isinstance(error, SpoolError):
                raise
            return
        if result is None:
            message = f"no dead job has the id {shown(request.id)}; `workerd dead` lists them"
            reply.complete(protocol.refusal(Code.NOT_FOUND, message, request.id))
        else:
            reply.complete(protocol.reply({"command": "dead", "result": result}))

    # --- lists --------------------------------------------------------------------------------------------

    async def _list(self, request: protocol.Dead, peer: Peer) -> dict[str, Any] | None:
        selection = structs.asdict(request)
        administers = self.admission.access.may_administer(peer)
        if not administers:
            selection["uid"] = peer.uid  # what others gave their jobs is no business of this one's
        asked = (request.after, request.limit, PAGE_BYTES)
        jobs, count, last, more = await self.reader.page(selection, asked, self._rendered, paced=not administers)
        if request.id is not None and not count:
            return None
        total = count if request.id is not None else self.engine.dead.total(selection.get("uid"), request.target)
        return {"jobs": jobs, "next": last if more else None, "total": total}

    def _rendered(self, page: DeadPage) -> tuple[msgspec.Raw, int, int, bool]:
        """The jobs as JSON, their number, the last seq, and whether more follow."""
        # one by one: to make JSON of all would keep the event loop from the interpreter
        jobs = b",".join([msgspec.json.encode(self._told(dead)) for dead in page.jobs])
        return msgspec.Raw(b"[%b]" % jobs), len(page.jobs), page.jobs[-1].job.seq if page.jobs else 0, page.more

    def _told(self, dead: DeadJob) -> dict[str, Any]:
        job = dead.job
        return {
            "id": self.engine.job_id(job.seq, job.key),
            "target": job.target,
            "arguments": protocol.as_raw(job.arguments),
            "uid": job.submitter and job.submitter.uid,
            "pid": job.submitter and job.submitter.pid,
            "submitted": clock.as_set(job.submitted),
            "ended": clock.as_set(dead.ended),
            "attempts": job.attempts,
            "crashes": job.crashes,
            "error": protocol.as_raw(dead.error or b"null"),
        }

    # --- changes, a piece at a time -----------------------------------------------------------------------

    async def _retry(self, request: protocol.Dead, _peer: Peer) -> dict[str, Any] | None:
        selection = structs.asdict(request)

        async def revive(within: tuple[int, int]) -> Piece:
            piece = await self._revive(selection, within)
            await self.engine.refilled()  # while jobs are being revived, none is read from the spool
            return piece

        return await self._in_pieces(request, "retried", revive)

    async def _delete(self, request: protocol.Dead, _peer: Peer) -> dict[str, Any] | None:
        selection, now = structs.asdict(request), clock.now()

        async def delete(within: tuple[int, int]) -> Piece:
            piece = await self.engine.writer.call(lambda spool: spool.delete_dead(selection, within, now))
            if (quotas := self.engine.queue.quotas) is not None:
                quotas.unload(piece.by_user())
            return piece

        return await self._in_pieces(request, "deleted", delete)

    async def _in_pieces(
        self, request: protocol.Dead, word: str, change: Callable[[tuple[int, int]], Awaitable[Piece]]
    ) -> dict[str, Any] | None:
        """Change a piece after the other; `change` is given the seq above which it begins, and the last of all."""
        after, upto = 0, self.engine.next_seq - 1
        total, more = 0, True
        while more:
            try:
                piece = await change((after, upto))
            except SpoolError as error:
                if not total:
                    raise
                raise SpoolError(f"{total} dead jobs were {word} before this: {error}") from error
            self.engine.dead.remove(piece.jobs())
            total, after, more = total + len(piece.seqs), piece.last, piece.more
        return {word: total} if total or request.id is None else None

    async def _revive(self, selection: dict[str, Any], within: tuple[int, int]) -> Piece:
        # revived jobs join the end of their lines, so they need new places in the order
        engine, now = self.engine, clock.now()
        first = engine.next_seq
        engine.next_seq += PIECE_JOBS
        ready: dict[int, int] = {}
        engine.queue.backlog.freeze((now, first))
        try:
            revived = await engine.writer.call(lambda spool: spool.revive(selection, within, first, now))
            ready = revived.ready
        finally:
            engine.queue.revived(ready)
            engine.settled()
        return revived.piece
