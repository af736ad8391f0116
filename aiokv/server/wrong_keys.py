"""Callers that offer wrong keys: counted, logged and slowed."""

import ipaddress
import logging
from collections import OrderedDict

from aiokv import clock as process_clock

logger = logging.getLogger("aiokv.server")

_FIRST_DELAY_SECONDS = 0.1
_MAX_DELAY_SECONDS = 5.0
_MAX_DOUBLINGS = 16
_FORGET_SECONDS = 600.0
_MAX_ADDRESSES = 4_096
_LOG_INTERVAL_SECONDS = 60.0
_MAX_ADDRESS_CHARS = 64
_IPV6_NETWORK_BITS = 64
_UNKNOWN_ID = "no key's id"


class WrongKeys:
    """The wrong keys that a server was offered.

    An address is an IPv4 address or the /64 network of an IPv6 address, which one machine can use all of. The latest 4,096
    addresses are remembered, each for ten minutes after its last failure.
    """

    def __init__(self) -> None:
        self.count = 0
        """Wrong keys offered so far."""
        # The failures of each address, and the time of the last one; the latest address stands last.
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._next_line: dict[str, float] = {}

    def add(self, key_id: str | None, address: str) -> None:
        """Count a wrong key, and log it: at most one line a minute for each key id.

        Args:
            key_id: The id that was offered, where the access file has it. None for any other: it may be a secret.
            address: The address of the caller.
        """
        self.count += 1
        now = process_clock.monotonic()
        network = network_of(address)
        self._failures[network] = (self._failures_of(network, now) + 1, now)
        self._failures.move_to_end(network)
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)
        name = _UNKNOWN_ID if key_id is None else key_id
        if now >= self._next_line.get(name, now):
            self._next_line[name] = now + _LOG_INTERVAL_SECONDS
            logger.warning(
                "wrong key from %s for %s; wrong keys since the start: %d",
                address[:_MAX_ADDRESS_CHARS] or "an unknown address",
                "an id that no key has" if key_id is None else f"id {key_id}",
                self.count,
            )

    def delay_of(self, address: str) -> float:
        """Return how long the answer to a wrong key should wait.

        Args:
            address: The address of the caller.

        Returns:
            0.1 seconds after the first failure of the address, doubling up to 5 seconds; 0.0 ten minutes after the last.
        """
        failures = self._failures_of(network_of(address), process_clock.monotonic())
        if not failures:
            return 0.0
        return min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))

    def _failures_of(self, network: str, now: float) -> int:
        failures, last = self._failures.get(network, (0, now))
        return failures if now - last < _FORGET_SECONDS else 0


def network_of(address: str) -> str:
    """Return what one machine's addresses have in common.

    Args:
        address: An IP address, or any other text.

    Returns:
        The /64 network of an IPv6 address; any other address as it is, 64 characters at most.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:_MAX_ADDRESS_CHARS]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed), _IPV6_NETWORK_BITS), strict=False))
