"""Every exception that aiohttp can raise at a client has a mapped of ours; a release that adds one is noticed."""

import asyncio
import importlib
import inspect
import pkgutil
import ssl
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.client_exceptions import UnixClientConnectorError
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from aiokv.backends.http.aiohttp_errors import ERROR_MAP, map_error
from aiokv.errors import CallError, CallTimeoutError, ConnectError, ResponseError, TransportError

# A server's, a multipart body's, and a WebSocket's: no client of this protocol meets them.
OF_OTHERS = {
    "BadContentDispositionHeader",
    "BadContentDispositionParam",
    "CleanupError",
    "GracefulExit",
    "LookupError",
    "NotAppKeyWarning",
    "PayloadAccessError",
    "RequestPayloadError",
    "WSHandshakeError",
    "WSMessageTypeError",
    "WebSocketError",
}
# Caught by aiohttp's own reader before anybody else sees them.
INTERNAL = {"EofStream", "TooManyMembersError"}

EXPECTED: dict[str, tuple[type[CallError], bool]] = {
    "ClientConnectionError": (TransportError, True),
    "ClientConnectionResetError": (TransportError, True),
    "ClientConnectorCertificateError": (ConnectError, False),
    "ClientConnectorDNSError": (ConnectError, False),
    "ClientConnectorError": (ConnectError, False),
    "ClientConnectorSSLError": (ConnectError, False),
    "ClientError": (TransportError, True),
    "ClientHttpProxyError": (ResponseError, True),
    "ClientOSError": (TransportError, True),
    "ClientPayloadError": (TransportError, True),
    "ClientProxyConnectionError": (ConnectError, False),
    "ClientResponseError": (ResponseError, True),
    "ClientSSLError": (ConnectError, False),
    "ConnectionTimeoutError": (ConnectError, False),
    "ContentTypeError": (ResponseError, True),
    "InvalidURL": (ConnectError, False),
    "InvalidUrlClientError": (ConnectError, False),
    "InvalidUrlRedirectClientError": (ConnectError, False),
    "NonHttpUrlClientError": (ConnectError, False),
    "NonHttpUrlRedirectClientError": (ConnectError, False),
    "RedirectClientError": (ConnectError, False),
    "ServerConnectionError": (TransportError, True),
    "ServerDisconnectedError": (TransportError, True),
    "ServerFingerprintMismatch": (ConnectError, False),
    "ServerTimeoutError": (CallTimeoutError, True),
    "SocketTimeoutError": (CallTimeoutError, True),
    "TooManyRedirects": (ResponseError, True),
    "UnixClientConnectorError": (ConnectError, False),
    "UploadAbortedError": (TransportError, True),
    "WSServerHandshakeError": (ResponseError, True),
    # aiohttp.http_exceptions, which its parser raises and its client wraps.
    "BadHttpMessage": (ResponseError, True),
    "BadHttpMethod": (ResponseError, True),
    "BadStatusLine": (ResponseError, True),
    "ContentEncodingError": (ResponseError, True),
    "ContentLengthError": (ResponseError, True),
    "DecompressSizeError": (ResponseError, True),
    "HttpBadRequest": (ResponseError, True),
    "HttpProcessingError": (ResponseError, True),
    "InvalidHeader": (ResponseError, True),
    "InvalidURLError": (ResponseError, True),
    "LineTooLong": (ResponseError, True),
    "PayloadEncodingError": (ResponseError, True),
    "TransferEncodingError": (ResponseError, True),
}


def exceptions_of_aiohttp() -> dict[str, type[BaseException]]:
    found: dict[str, type[BaseException]] = {}
    for module in pkgutil.walk_packages(aiohttp.__path__, "aiohttp."):
        # What only a server answers with, and what needs a server of another kind to be imported.
        if module.name in {"aiohttp.web_exceptions", "aiohttp.worker"}:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if not (inspect.isclass(value) and issubclass(value, BaseException)):
                continue
            if value.__module__.startswith("aiohttp.") and value.__module__ != "aiohttp.web_exceptions":
                found[name] = value
    return found


CLASSES = exceptions_of_aiohttp()


def made(kind: type[BaseException]) -> Any:
    """Make an instance as it is where it is raised: its fields are there, its constructor differs from class to class."""
    error: Any = kind.__new__(kind)
    if issubclass(kind, aiohttp.ClientResponseError):
        headers = CIMultiDictProxy(CIMultiDict({"Authorization": "Bearer hunter2"}))
        info = aiohttp.RequestInfo(URL("http://host/get/db/k"), "GET", headers, URL("http://host/get/db/k"))
        error.__init__(info, (), status=400, message="Bearer hunter2", headers=headers)
    elif issubclass(kind, aiohttp.ClientConnectorCertificateError):
        error.__init__(Mock(ssl=True, host="host", port=1), ssl.SSLCertVerificationError(1, "self-signed certificate"))
    elif issubclass(kind, UnixClientConnectorError):
        error.__init__("/socket", Mock(), OSError(111, "refused"))
    elif issubclass(kind, aiohttp.ClientConnectorError):
        error.__init__(Mock(ssl=True, host="host", port=1), OSError(111, "refused"))
    elif issubclass(kind, aiohttp.ServerFingerprintMismatch):
        error.__init__(b"a", b"b", "host", 1)
    return error


def test_no_exception_of_aiohttp_is_without_a_mapped() -> None:
    assert set(CLASSES) - OF_OTHERS - INTERNAL == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("write", [False, True])
def test_exception_of_aiohttp_has_its_mapped(name: str, *, write: bool) -> None:
    kind, sent = EXPECTED[name]
    error = map_error(made(CLASSES[name]), 3.0, write=write)
    assert type(error) is kind
    assert error.maybe_applied is (write and sent)
    assert "hunter2" not in f"{error}{error!r}{error.__cause__!r}{error.__context__!r}"


@pytest.mark.parametrize("error", [TimeoutError(), asyncio.TimeoutError()])  # noqa: UP041 (they are one today)
def test_time_that_ran_out_is_told_from_a_broken_connection(error: Exception) -> None:
    assert type(map_error(error, 3.0, write=True)) is CallTimeoutError


@pytest.mark.parametrize("error", [OSError(104, "x"), ConnectionResetError(104, "x"), BrokenPipeError(32, "x"), ssl.SSLError()])
def test_error_of_the_system_is_a_broken_connection(error: Exception) -> None:
    assert type(map_error(error, 3.0, write=True)) is TransportError


def test_server_that_hangs_up_on_plain_http_may_want_tls() -> None:
    error = aiohttp.ServerDisconnectedError()
    assert "may want https://" in str(map_error(error, 3.0, write=False, plain=True))
    assert "https" not in str(map_error(error, 3.0, write=False))


def test_certificate_and_url_are_not_worth_another_try() -> None:
    final = {kind for kind, mapped in ERROR_MAP.items() if mapped.transient is False}
    assert final == {
        aiohttp.ClientConnectorCertificateError,
        aiohttp.ServerFingerprintMismatch,
        aiohttp.InvalidURL,
        aiohttp.NonHttpUrlClientError,
        aiohttp.RedirectClientError,
    }


@pytest.mark.parametrize(
    ("reason", "transient"),
    [("WRONG_VERSION_NUMBER", False), ("RECORD_LAYER_FAILURE", False), ("TLSV1_ALERT", True)],
)
def test_handshake_with_a_server_that_speaks_no_tls_names_the_remedy(reason: str, *, transient: bool) -> None:
    cause = ssl.SSLError(1, f"[SSL: {reason}]")
    cause.reason = reason
    error = map_error(aiohttp.ClientConnectorSSLError(Mock(ssl=True, host="host", port=1), cause), 3.0, write=True)
    assert type(error) is ConnectError
    assert error.transient is transient
    assert ("use http://" in str(error)) is not transient


def test_special_exceptions_stand_before_those_that_they_are_instances_of() -> None:
    kinds = list(ERROR_MAP)
    for place, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[place + 1 :]), kind
