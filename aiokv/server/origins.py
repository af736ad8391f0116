"""Whose requests are answered: which host they are for, and which web pages may have sent them."""

import re
from urllib.parse import urlsplit

from aiokv.server.answers import Answer, refusal
from aiokv.wire import is_loopback

# Source: RFC 3986 section 3.2.2, names and addresses without user information.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")


def check_host(host: bytes, *, only_loopback: bool) -> Answer | None:
    """Check the host that a request is for.

    DNS rebinding: a web page whose host name leads to this machine could send requests here and read the answers.

    Args:
        host: The Host header, or the target's authority.
        only_loopback: Whether it must be a name of this machine.

    Returns:
        None, or the refusal.
    """
    if host and not _HOST.fullmatch(host):
        return refusal(400, "the Host header is no host name", reason="host")
    if not only_loopback or _is_loopback(host):
        return None
    message = "without an access file this server answers to localhost, 127.0.0.1 and [::1] only"
    return refusal(403, message, reason="host")


def check_origin(fields: dict[bytes, bytes]) -> Answer | None:
    """Check what a browser says of the page that sent a request.

    Args:
        fields: The request's headers.

    Returns:
        None where no page sent it, or one of this machine, else the refusal.
    """
    origin = fields.get(b"origin")
    is_foreign = origin is not None and not _is_own(origin.partition(b"://")[2])
    if not is_foreign and fields.get(b"sec-fetch-site") != b"cross-site":
        return None
    return refusal(403, "without an access file this server takes no requests from web pages of elsewhere", reason="origin")


def _is_own(host: bytes) -> bool:
    return _HOST.fullmatch(host) is not None and _is_loopback(host)


def _is_loopback(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('ascii')}").hostname)
    except ValueError:
        return False
