"""Claims on the wire, shared by the client and the server: paths, queries and answers.

`docs/protocol.md` describes them.
"""

import re
from typing import NamedTuple
from urllib.parse import quote

import orjson

from aiokv.backends.capabilities import MAX_CLAIM_SECONDS, MIN_CLAIM_SECONDS, ClaimOutcome
from aiokv.extension_wire import build_query, number_in, parse_answer, parse_query

_OWNER = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,20})?")


class ClaimQuery(NamedTuple):
    """The query of `/claims/{db_name}/{key}`; of a release the owner alone."""

    owner: str
    seconds: float = 0.0
    is_renewal: bool = False


def parse_claim_query(query: str, *, has_seconds: bool) -> ClaimQuery:
    """Parse the query of a claim or a release.

    Args:
        query: The raw query without its question mark.
        has_seconds: Whether it says how long the claim lasts.

    Returns:
        What it asks for.

    Raises:
        ValueError: A parameter is unknown, missing, given twice or not acceptable.
    """
    given = parse_query(query, ("owner", "seconds", "renew") if has_seconds else ("owner",))
    owner, seconds = given.get("owner", ""), given.get("seconds", "")
    if not _OWNER.fullmatch(owner):
        raise ValueError("owner must be 1 to 128 ASCII letters, digits, '-' and '_', and different from everybody else's")
    if not has_seconds:
        return ClaimQuery(owner)
    if not _SECONDS.fullmatch(seconds) or not MIN_CLAIM_SECONDS <= float(seconds) <= MAX_CLAIM_SECONDS:
        raise ValueError(f"seconds must be a decimal number from {MIN_CLAIM_SECONDS:g} to {MAX_CLAIM_SECONDS:,g}")
    if given.get("renew", "1") != "1":
        raise ValueError("renew must be 1, or be left out")
    return ClaimQuery(owner, float(seconds), "renew" in given)


def claim_path(db_name: str, key: str, owner: str, seconds: float | None = None, *, is_renewal: bool = False) -> str:
    """Build the path and query of a claim (PUT) or a release (DELETE, without seconds).

    Args:
        db_name: A checked namespace.
        key: A checked key.
        owner: Who claims; a secret, so that the query must not be logged.
        seconds: How long the claim lasts.
        is_renewal: Whether only what the owner holds already is claimed; for a server that names `renew`.

    Returns:
        `/claims/{db_name}/{key}?...`, percent-encoded.
    """
    query = {"owner": owner} if seconds is None else {"owner": owner, "seconds": f"{seconds:.6f}".rstrip("0").rstrip(".")}
    if is_renewal:
        query["renew"] = "1"
    return f"/claims/{quote(db_name, safe='')}/{quote(key, safe='')}?{build_query(query)}"


def claim_body(outcome: ClaimOutcome) -> bytes:
    """Build the answer of a claim, with status 200 where it is held and 409 where not."""
    return orjson.dumps({"held": outcome.is_held, "seconds_left": round(outcome.seconds_left, 6)})


def parse_claim(body: bytes, *, is_held: bool) -> ClaimOutcome:
    """Parse the answer of a claim.

    Args:
        body: The body of an answer with status 200 or 409.
        is_held: Whether the status is 200.

    Returns:
        Who holds the claim.

    Raises:
        ValueError: The body is no such answer; one with status 409 may then be an error as everywhere.
    """
    answer = parse_answer(body)
    seconds = number_in(answer.get("seconds_left"))
    if seconds is None or not 0 <= seconds <= 2 * MAX_CLAIM_SECONDS or answer.get("held") is not is_held:
        raise ValueError("the answer's member held must fit the status, and seconds_left must be a number of seconds")
    return ClaimOutcome(is_held, seconds)


def released_body(*, was_held: bool) -> bytes:
    """Build the answer of a release."""
    return orjson.dumps({"released": was_held})


def parse_released(body: bytes) -> bool:
    """Parse the answer of a release, with status 200; raise `ValueError` where the body is none."""
    released = parse_answer(body).get("released")
    if not isinstance(released, bool):
        raise ValueError("the answer's member released must be true or false")  # noqa: TRY004 (one kind for every fault)
    return released
