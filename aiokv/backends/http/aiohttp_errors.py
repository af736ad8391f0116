"""What each of aiohttp's exceptions becomes."""

import os
import socket
import ssl
from typing import NamedTuple

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from aiokv.errors import CallError, CallTimeoutError, ConnectError, ResponseError, TransportError


class _Mapped(NamedTuple):
    """What one of aiohttp's exceptions becomes."""

    kind: type[CallError]
    message: str
    # Whether the other side may have seen the request.
    sent: bool
    transient: bool | None = None


_BAD_URL = _Mapped(ConnectError, "aiohttp refuses the URL", sent=False, transient=False)
_NOT_HTTP = _Mapped(ResponseError, "the answer is not HTTP ({detail})", sent=True)
_NO_ANSWER = _Mapped(CallTimeoutError, "no answer in time", sent=True)
_NOT_IN_TIME = _Mapped(CallTimeoutError, "no connection before the call's time was over", sent=False)
_PLAIN_HTTP = _Mapped(
    ConnectError,
    "the TLS handshake failed ({detail}): the server seems to speak plain HTTP; use http://, or serve with a certificate",
    sent=False,
    transient=False,
)
# What OpenSSL makes of an answer that is not TLS; the second since OpenSSL 3.2.
_NOT_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}
_BROKEN = _Mapped(TransportError, "the connection broke ({detail})", sent=True)

# The most special first: the first one that an exception is an instance of counts.
ERROR_MAP: dict[type[Exception], _Mapped] = {
    aiohttp.ConnectionTimeoutError: _Mapped(ConnectError, "no connection within {connect_seconds:g} s", sent=False),
    aiohttp.ServerTimeoutError: _NO_ANSWER,
    TimeoutError: _NO_ANSWER,
    aiohttp.ClientConnectorCertificateError: _Mapped(
        ConnectError,
        "the server's certificate is not trusted ({detail}); name its authority with HttpOptions(ca_file=...) or SSL_CERT_FILE",
        sent=False,
        transient=False,
    ),
    aiohttp.ClientConnectorDNSError: _Mapped(ConnectError, "the host name cannot be resolved ({detail})", sent=False),
    aiohttp.ClientSSLError: _Mapped(ConnectError, "the TLS handshake failed ({detail})", sent=False),
    aiohttp.ServerFingerprintMismatch: _Mapped(ConnectError, "the certificate is another one", sent=False, transient=False),
    aiohttp.ClientConnectorError: _Mapped(ConnectError, "no connection ({detail})", sent=False),
    aiohttp.ClientResponseError: _NOT_HTTP,
    HttpProcessingError: _NOT_HTTP,
    aiohttp.InvalidURL: _BAD_URL,
    aiohttp.NonHttpUrlClientError: _BAD_URL,
    aiohttp.RedirectClientError: _BAD_URL,
    aiohttp.ClientPayloadError: _BROKEN,
    aiohttp.ClientConnectionError: _BROKEN,
    aiohttp.ClientError: _BROKEN,
    OSError: _BROKEN,
}


def map_error(
    error: Exception, connect_seconds: float, *, write: bool, connected: bool = True, plain: bool = False
) -> CallError:
    """Return aiokv's error for one of aiohttp's or the system's.

    Args:
        error: The other library's error.
        connect_seconds: How long a connection may take, for the message.
        write: Whether the request would have changed something.
        connected: False where the request is known to have had no connection, so that nothing was sent.
        plain: Whether it went over plain HTTP.

    Returns:
        The error, without headers and bodies; a write that was sent may have been applied.
    """
    mapped = next(mapped for theirs, mapped in ERROR_MAP.items() if isinstance(error, theirs))
    if isinstance(error, aiohttp.ClientConnectorSSLError) and getattr(error.os_error, "reason", None) in _NOT_TLS:
        mapped = _PLAIN_HTTP
    if mapped is _NO_ANSWER and not connected:
        mapped = _NOT_IN_TIME
    message = mapped.message.format(detail=_detail(error), connect_seconds=connect_seconds)
    if plain and isinstance(error, aiohttp.ServerDisconnectedError):
        message += "; if every call ends so, the server may want https://"
    return mapped.kind(message, maybe_applied=write and mapped.sent and connected, transient=mapped.transient)


def _detail(error: Exception) -> str:
    """Return the cause of an error, in the system's words where it has any."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, socket.gaierror | ssl.SSLError):
        # Their numbers are not those of os.strerror.
        return cause.strerror or type(cause).__name__
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return type(cause).__name__
