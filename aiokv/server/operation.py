"""What an operator sees of a server: its figures, its page, its log of requests, and its description."""

import contextlib
from collections.abc import Coroutine
from importlib.metadata import version

from aiokv.backends.base import Backend, Gauges, HostedBackend
from aiokv.errors import CallError
from aiokv.server import metrics, openapi, status_page
from aiokv.server.access import AccessFile
from aiokv.server.access_log import AccessLog
from aiokv.server.answers import Answer
from aiokv.server.requests import Request
from aiokv.server.service import Service
from aiokv.server.statistics import REASONS, VERBS, Statistics

_VERB_INDICES = {verb: index for index, verb in enumerate(VERBS)} | {"": VERBS.index("other")}
_REASONS = frozenset(REASONS)
_CLIENT_LEFT = 499


class Operation:
    """Counts and logs what a service does, and adds the pages that show it.

    Args:
        service: Gets the pages `/metrics`, `/status`, `/status.json` and `/openapi.json`.
        backend: The store of the values.
        access: The accounts, or None.
        statistics: The counters of this process.
        access_log: The log of requests, or None.
    """

    def __init__(
        self,
        service: Service,
        backend: Backend,
        access: AccessFile | None,
        statistics: Statistics,
        access_log: AccessLog | None,
    ) -> None:
        self._service = service
        self._hosted = backend if isinstance(backend, HostedBackend) else None
        self._access = access
        self._wrong_keys = 0
        self._version = version("aiokv")
        self.statistics = statistics
        self.access_log = access_log
        service.pages |= {
            b"/metrics": (self._metrics, True),
            b"/status": (self._status, True),
            b"/status.json": (self._status_figures, True),
            b"/openapi.json": (self._openapi, False),
        }

    def answered(  # noqa: PLR0913 (each is one figure)
        self,
        request: Request,
        answer: Answer,
        address: str,
        seconds: float,
        *,
        is_sent: bool,
        bytes_out: int | None = None,
    ) -> None:
        """Count and log an answer.

        Args:
            request: The request.
            answer: Its answer.
            address: The client's address.
            seconds: How long the answer took once the request was there.
            is_sent: Whether the client was still there to get it.
            bytes_out: The size of what was sent in place of the answer's body.
        """
        status = answer.status if is_sent else _CLIENT_LEFT
        if bytes_out is None:
            bytes_out = len(answer.body) if is_sent else 0
        self.statistics.record(_VERB_INDICES[request.verb], status, seconds, request.received_bytes, bytes_out)
        if answer.reason:
            self.refused(answer.reason)
        if self.access_log is not None:
            self.access_log.write(
                request_id=request.id,
                address=address,
                account=request.account or None,
                verb=request.verb or "other",
                db_name=request.db_name.removeprefix(f"{request.account}:") or None,
                key=(request.key or None) if request.db_name else None,
                status=status,
                bytes_in=request.received_bytes,
                bytes_out=bytes_out,
                seconds=seconds,
                # The verb is set for known pages alone.
                path=request.target.partition(b"?")[0].decode("latin-1") if request.verb == "other" else None,
            )

    def refused(self, reason: str) -> None:
        """Count a refusal.

        Args:
            reason: A word of `statistics.REASONS`; others are not counted.
        """
        if reason in _REASONS:
            self.statistics.refused(reason)  # type: ignore[arg-type]  # checked above

    def publish(self) -> Gauges | None:
        """Make what this process's parts have counted visible to the other processes; called every few seconds.

        Returns:
            The present figures of the backend, where it has some.
        """
        if self._access is not None:
            for _ in range(self._access.wrong_keys - self._wrong_keys):
                self.statistics.wrong_key()
            self._wrong_keys = self._access.wrong_keys
        extensions = self._service.extensions
        self.statistics.extensions(extensions.watches.count, extensions.take_key_counts())
        gauges = None
        if self._hosted is not None:
            # The figures of a store that cannot be read are the last ones.
            with contextlib.suppress(CallError):
                gauges = self._hosted.gauges()
                self.statistics.publish(gauges)
        return gauges

    async def _metrics(self) -> Answer:
        # A coroutine, so that the other connections have a turn before the next of them.
        answer = Answer(200, metrics.exposition(self.statistics, self.publish(), self._version))
        answer.content_type = metrics.CONTENT_TYPE.encode()
        return answer

    def _openapi(self) -> Answer:
        return Answer(200, openapi.document(self._version))

    def _status(self) -> Coroutine[None, None, Answer]:
        return self._show(as_page=True)

    def _status_figures(self) -> Coroutine[None, None, Answer]:
        return self._show(as_page=False)

    async def _show(self, *, as_page: bool) -> Answer:
        problem = await self._service.readiness.problem()
        write = status_page.page if as_page else status_page.figures
        answer = Answer(200, write(self.statistics, self.publish(), self._version, problem))
        if as_page:
            answer.content_type = b"text/html; charset=utf-8"
            answer.headers = b"Content-Security-Policy: %b\r\n" % status_page.CONTENT_SECURITY_POLICY.encode()
        return answer
