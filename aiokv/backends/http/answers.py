"""What an answer that is no success becomes: an error without the secrets that the answer may echo."""

from aiokv.backends.http.transport import Answer
from aiokv.errors import CallError, ResponseError
from aiokv.wire import NO_SUCH_PATH, error_body, error_detail, error_for_status, parse_retry_after, printable, redact

_OK = 200
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404
# Without the end of the text and of the JSON.
_NO_SUCH_PATH = error_body(NO_SUCH_PATH)[:-2]


def refused_exchange(answer: Answer, authorization: str, source: str) -> CallError:
    """Return the error of a token exchange that was refused.

    Args:
        answer: The token endpoint's answer.
        authorization: The header that was sent.
        source: Where the credentials were found.

    Returns:
        The error.
    """
    error = error_of(answer, secrets_of(authorization), write=False)
    if answer.status in {_UNAUTHORIZED, _FORBIDDEN}:
        error.reason += f"; the credentials were refused: check {source}"
    return error


def secrets_of(header: str | None) -> tuple[str, ...]:
    """Return what no message may repeat of an Authorization header.

    Args:
        header: The header, or None.

    Returns:
        The token or key, and the secret half of a key.
    """
    # The header's second word is the token or the key, and a key's second half is the secret.
    secret = (header or "").partition(" ")[2]
    return (secret, secret.partition(":")[2])


def error_of(answer: Answer, secrets: tuple[str, ...], *, write: bool) -> CallError:
    """Return the error of an answer that is no success.

    Args:
        answer: The answer.
        secrets: What no message may repeat.
        write: Whether the call would have changed something.

    Returns:
        The error.
    """
    detail = error_detail(answer.body, secrets)
    if answer.headers.get("Location"):
        detail += "; redirects are not followed, name the final address"
    error = error_for_status(
        answer.status, detail, retry_after=parse_retry_after(answer.headers.get("Retry-After")), write=write
    )
    error.request_id = id_of_request(answer, secrets)
    return error


def is_good(answer: Answer) -> bool:
    """Return whether a read's answer makes a second one needless."""
    return answer.status in {_OK, _NOT_FOUND}


def check_absent(answer: Answer) -> None:
    """Raise ResponseError where a get's 404 is not about the key.

    Args:
        answer: The answer. fal's service promises no body, so only what surely says something else is refused.
    """
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        reason = "the answer is a page, so no such service answers there: look at the host and the port in the URL"
    elif answer.body.startswith(_NO_SUCH_PATH):
        reason = "the server does not know the path of the call: look at the path in the URL; `aiokv serve` is at its top"
    else:
        return
    raise ResponseError(reason, status=answer.status)


def id_of_request(answer: Answer, secrets: tuple[str, ...]) -> str | None:
    """Return the service's identifier of a request.

    Args:
        answer: The answer.
        secrets: What no message may repeat.

    Returns:
        It, or None where the answer names none.
    """
    request_id = answer.headers.get("X-Fal-Request-Id") or answer.headers.get("X-Request-Id")
    return printable(redact(request_id, secrets)) if request_id else None
