"""Whether a request may come in, and what it holds of the server while it is there."""

from aiokv.backends.base import Backend
from aiokv.batch_wire import MAX_BATCH_BODY_BYTES
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.server.access import AccessFile
from aiokv.server.answers import RETRY_SOON, Answer, no_room, refusal, too_fast, too_large, unauthorized
from aiokv.server.budget import SMALL_BYTES, Budget
from aiokv.server.options import ServerOptions
from aiokv.server.origins import check_host, check_origin
from aiokv.server.quotas import AccountLimits, Quotas
from aiokv.server.requests import BODY_VERBS, Request
from aiokv.wire import Verb, parse_entry_path, parse_ttl_query

# Of what is no set, the body is thrown away as it comes.
_MAX_OTHER_BODY_BYTES = 64 * 1024
_MAX_KNOWN_HOSTS = 64
_UNKNOWN = Answer(0, b"")


class Admission:
    """What keeps requests out: hosts, accounts, rates, quotas and the budget of bytes in flight.

    Args:
        backend: The store of the values, for what accounts have stored.
        access: The accounts, or None.
        options: The bounds.

    Attributes:
        access: The accounts.
        budget: The bytes in flight.
        quotas: What each account may ask for and store.
        has_rates: Whether an account may have a rate.
    """

    def __init__(self, backend: Backend, access: AccessFile | None, options: ServerOptions) -> None:
        self.access = access
        self.budget = Budget(options.max_bytes_in_flight, is_shared=access is not None)
        defaults = AccountLimits(options.requests_per_second, options.max_stored_bytes, options.max_stored_entries)
        self.quotas = Quotas(
            (lambda _: defaults) if access is None else access.limits_of, backend=backend, of_all=access is None
        )
        self.has_rates = access is not None or options.requests_per_second is not None
        self._known_hosts: dict[bytes, Answer | None] = {}

    def check_origin(self, request: Request, host: bytes) -> Answer | None:
        """Check where a request was sent to, and from.

        Args:
            request: The request.
            host: The host that it names.

        Returns:
            None, or the refusal.
        """
        refused = self._known_hosts.get(host, _UNKNOWN)
        if refused is _UNKNOWN:
            refused = self._check_host(host)
        if refused is None and self.access is None and (b"origin" in request.fields or b"sec-fetch-site" in request.fields):
            refused = check_origin(request.fields)
        return refused

    def admits_host(self, host: bytes) -> bool:
        """Return whether requests for a host are answered."""
        return self._check_host(host) is None

    def owner_of(self, verb: Verb, db_name: str, authorization: str) -> tuple[str, str]:
        """Find whose a call is, where there are accounts.

        Args:
            verb: The call.
            db_name: The namespace, as the client names it.
            authorization: The Authorization header.

        Returns:
            The account, and the namespace with the account included; "" for both where the call is not allowed.
        """
        permit = None if self.access is None else self.access.permit_of_token(authorization)
        if permit is None or permit.allows(verb, db_name) is not None:
            return "", ""
        return permit.account, f"{permit.account}:{db_name}"

    def admit_entry(self, request: Request, entry: bytes, query: bytes) -> Answer | None:
        """Admit a get, set or delete of one key.

        Args:
            request: The request, with its verb; gets its names and account.
            entry: The path behind the verb.
            query: The query.

        Returns:
            None, or the refusal.
        """
        permit = None
        if self.access is not None:
            authorization = request.fields.get(b"authorization", b"").decode("latin-1")
            permit = self.access.permit_of_token(authorization)
            if permit is None:
                return unauthorized()
            request.account = permit.account
        if self.has_rates and (wait_seconds := self.quotas.admit(request.account)):
            return too_fast(wait_seconds)
        try:
            db_name, request.key = parse_entry_path(entry.decode("utf-8", "surrogateescape"))
            if request.verb == "set":
                request.ttl_seconds = parse_ttl_query(query.decode("utf-8", "surrogateescape")) or DEFAULT_TTL_SECONDS
        except ValueError as error:
            return refusal(400, str(error))
        request.db_name = db_name
        if permit is not None:
            if reason := permit.allows(request.verb, db_name):
                return refusal(403, reason, reason="forbidden")
            # The prefix ends at the first ":", since no account holds one.
            request.db_name = f"{request.account}:{db_name}"
        return None

    def admit_body(self, request: Request) -> Answer | None:
        """Take the room that a body needs.

        Args:
            request: The request, with its names and account.

        Returns:
            None, or the refusal.
        """
        limit_bytes = _limit_of(request)
        encoding = request.fields.get(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            return refusal(415, "the body must be sent without Content-Encoding")
        size_bytes = request.content_length
        if size_bytes is None:
            return self.check_quota(request, 0)
        if size_bytes > limit_bytes:
            return too_large(size_bytes, limit_bytes)
        if refused := self.check_quota(request, size_bytes):
            return refused
        if size_bytes and request.verb in BODY_VERBS:
            if not self.budget.take(request.account, size_bytes, is_large=size_bytes > SMALL_BYTES):
                return no_room()
            request.held_bytes = size_bytes
        return None

    def check_quota(self, request: Request, size_bytes: int) -> Answer | None:
        """Check a set against what its account may store; return the refusal, None also for other verbs."""
        if request.verb != "set":
            return None
        reason = self.quotas.check_set(request.account, request.db_name, request.key, size_bytes)
        return None if reason is None else refusal(507, reason, reason="quota")

    def release(self, request: Request) -> None:
        """Give back what a request holds; once it is answered or its connection is gone.

        Args:
            request: The request; a second time does nothing.
        """
        if request.held_bytes:
            self.budget.give_back(request.account, request.held_bytes)
            request.held_bytes = 0

    def hold_more(self, request: Request, size_bytes: int) -> Answer | None:
        """Take room for a piece of a body whose length was not declared, or that is thrown away.

        Args:
            request: The request.
            size_bytes: The size of the piece.

        Returns:
            None, or the answer where the body is too long or there is no room.
        """
        limit_bytes = _limit_of(request)
        if request.received_bytes > limit_bytes:
            return too_large(None, limit_bytes)
        if request.verb not in BODY_VERBS:
            return None
        if not self.budget.take(request.account, size_bytes, is_large=request.received_bytes > SMALL_BYTES):
            return no_room()
        request.held_bytes += size_bytes
        return None

    def hold_answer(self, request: Request, answer: Answer) -> Answer:
        """Take room for a large answer, until `release`.

        Args:
            request: The request.
            answer: Its answer.

        Returns:
            The answer, or another one where there is no room.
        """
        if not self.budget.take(request.account, len(answer.body), is_large=True):
            # Closed: a pipeline of such requests would cost a large read for each small refusal.
            message = "the server holds as many bytes as it may; come again"
            return refusal(503, message, RETRY_SOON, closes=True, reason="bytes_in_flight")
        request.held_bytes = len(answer.body)
        return answer

    def _check_host(self, host: bytes) -> Answer | None:
        refused = check_host(host, only_loopback=self.access is None)
        if len(self._known_hosts) >= _MAX_KNOWN_HOSTS:
            self._known_hosts.clear()
        self._known_hosts[host] = refused
        return refused


def _limit_of(request: Request) -> int:
    if request.verb == "batch":
        return MAX_BATCH_BODY_BYTES
    return MAX_VALUE_BYTES if request.verb == "set" else _MAX_OTHER_BODY_BYTES
