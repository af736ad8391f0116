"""The text of an access file, version 2: what its lines say, and how they are written.

```
# a comment
!signing-key <64 hex digits>
alice:sha256:<hash of a secret> read-only operator db=cache-*,config
@limits alice requests-per-second=100 max-bytes=1000000000 max-entries=none
```

The flags of a key are `read-only` and `operator`. `db=` has patterns of the namespaces that it may use: `*` is any text, and
commas, `%`, spaces and what is not ASCII are percent-encoded. An account with two key lines has two keys. A limit that is
`none` is no limit; one that is not there is the server's default. A file of version 1 has no flags and no limits.
"""

import hashlib
import re
import string
from collections.abc import Mapping
from typing import NamedTuple, Self
from urllib.parse import quote, unquote

from aiokv.errors import ConfigurationError, truncated
from aiokv.limits import check_db_name
from aiokv.server.option_kinds import SIZE, read_size

_SHORT_ID_CHARS = 8
ACCOUNT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SIGNING_KEY_LINE = re.compile(r"!signing-key ([0-9a-f]{64})")
_KEY_WORD = re.compile(r"([A-Za-z0-9._-]{1,64}):sha256:([0-9a-f]{64})")
_RATE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
_NUMBER = re.compile(r"([0-9]{1,15})([kKmMgG]?)")
_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
_UNQUOTED = string.punctuation.replace(",", "").replace("%", "")

LIMIT_NAMES: Mapping[str, str] = {
    "requests-per-second": "requests_per_second",
    "max-bytes": "max_stored_bytes",
    "max-entries": "max_stored_entries",
}
"""The limits by their names in the file, each with its name in `AccountLimits`."""


class Comment(NamedTuple):
    """A line that says nothing: empty, or beginning with `#`."""

    text: str

    def write(self) -> str:
        """Return the line."""
        return self.text


class SigningKey(NamedTuple):
    """The line with the key that signs tokens."""

    secret: bytes

    def write(self) -> str:
        """Return the line."""
        return f"!signing-key {self.secret.hex()}"


class Key(NamedTuple):
    """One key of an account, and what it may do."""

    account: str
    key_hash: str
    read_only: bool = False
    operator: bool = False
    db_patterns: tuple[str, ...] | None = None

    @property
    def short_id(self) -> str:
        """The name of the key in `aiokv access`."""
        return short_id_of(self.key_hash)

    def flags(self) -> str:
        """Return the flags and patterns as they stand in the file."""
        words = ["read-only"] if self.read_only else []
        words += ["operator"] if self.operator else []
        if self.db_patterns is not None:
            words.append("db=" + ",".join(quote(pattern, safe=_UNQUOTED) for pattern in self.db_patterns))
        return " ".join(words)

    def write(self) -> str:
        """Return the line."""
        return f"{self.account}:sha256:{self.key_hash} {self.flags()}".rstrip()


class Limits(NamedTuple):
    """The limits that the file gives an account, by their names in the file; None is no limit."""

    account: str
    given: Mapping[str, float | None]

    def settings(self) -> str:
        """Return the limits as they stand in the file."""
        return " ".join(f"{name}={_write_number(value)}" for name, value in self.given.items())

    def write(self) -> str:
        """Return the line."""
        return f"@limits {self.account} {self.settings()}"


Line = Comment | SigningKey | Key | Limits
"""One line of an access file."""


class AccessText(NamedTuple):
    """The lines of an access file, in order."""

    lines: tuple[Line, ...]

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parse the content of a file.

        Args:
            content: The bytes of the file.

        Returns:
            The lines.

        Raises:
            ConfigurationError: It is no access file; the message has the number of the line, and nothing of what it says.
        """
        try:
            text: str | None = content.decode()
        except UnicodeDecodeError:
            # The error would hold the content, and so would one that is raised here.
            text = None
        if text is None:
            raise ConfigurationError("it is not text; make one with `aiokv access add <account>`")
        lines = tuple(_parse_line(line, number) for number, line in enumerate(text.splitlines(), start=1))
        _check_repetitions(lines)
        if not any(isinstance(line, SigningKey) for line in lines):
            raise ConfigurationError("it has no !signing-key line; make one with `aiokv access add <account>`")
        return cls(lines)

    def write(self) -> bytes:
        """Return the content of a file with these lines."""
        return "".join(f"{line.write()}\n" for line in self.lines).encode()

    @property
    def signing_key(self) -> bytes:
        """The key that signs tokens: the last one."""
        return next(line.secret for line in reversed(self.lines) if isinstance(line, SigningKey))

    def accounts(self) -> tuple[str, ...]:
        """Return the accounts that have a key or limits, in the order of the file."""
        return tuple(dict.fromkeys(line.account for line in self.lines if isinstance(line, Key | Limits)))

    def keys(self) -> dict[str, tuple[Key, ...]]:
        """Return the keys of each account that has any, each key once."""
        # A dict for each account: keys once, in order, in time linear in the file.
        keys: dict[str, dict[Key, None]] = {}
        for line in self.lines:
            if isinstance(line, Key):
                keys.setdefault(line.account, {})[line] = None
        return {account: tuple(found) for account, found in keys.items()}

    def limits(self) -> dict[str, Limits]:
        """Return the limits of each account that has any in the file."""
        return {line.account: line for line in self.lines if isinstance(line, Limits)}


def hash_of(secret: str) -> str:
    """Return the hash of a secret, as the file holds it.

    A secret is 256 random bits, so a plain hash protects it as well as a slow one.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def short_id_of(key_hash: str) -> str:
    """Return the first digits of a key's hash, by which `aiokv access` names the key."""
    return key_hash[:_SHORT_ID_CHARS]


def parse_limit(name: str, text: str) -> float | None:
    """Parse one limit.

    Args:
        name: Its name in the file.
        text: A number, or `none`. Bytes may be a size such as 64MiB or 2G; entries may end in k, M or G for thousands, millions
            and billions.

    Returns:
        The limit, None where it is `none`.

    Raises:
        ConfigurationError: There is no such limit, or it has no such value.
    """
    if name not in LIMIT_NAMES:
        raise ConfigurationError(f"no limit is called {truncated(name)}; there are {', '.join(LIMIT_NAMES)}")
    if text == "none":
        return None
    if name == "requests-per-second":
        if not _RATE.fullmatch(text) or not float(text):
            raise ConfigurationError(f"{name} must be a number above 0, such as 100 or 0.5, or none, not {truncated(text)}")
        return float(text)
    if name == "max-bytes":
        try:
            return read_size(text)
        except ValueError:
            raise ConfigurationError(f"{name} must be {SIZE.rule} or none, not {truncated(text)}") from None
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{name} must be a number such as 5000, 10k or 2M, or none, not {truncated(text)}")
    return int(match[1]) * _FACTORS[match[2].lower()]


def _parse_line(line: str, number: int) -> Line:
    words = line.split()
    if not words or words[0].startswith("#"):
        return Comment(line)
    if match := _SIGNING_KEY_LINE.fullmatch(line.strip()):
        return SigningKey(bytes.fromhex(match[1]))
    try:
        if words[0] == "@limits":
            return _parse_limits(words[1:])
        return _parse_key(words)
    except ValueError:
        # The message does not show the line, which may hold a secret.
        expected = (
            "@limits <account> with requests-per-second=, max-bytes= or max-entries=, each once and with a number or none"
            if words[0] == "@limits"
            else "<account>:sha256:<64 hex digits>, then read-only, operator or db=<pattern>,<pattern>, each at most once"
        )
    raise ConfigurationError(f"line {number}: expected {expected}")


def _parse_key(words: list[str]) -> Key:
    match = _KEY_WORD.fullmatch(words[0])
    if match is None or len({word.partition("=")[0] for word in words}) != len(words):
        raise ValueError
    key = Key(match[1], match[2])
    for word in words[1:]:
        if word == "read-only":
            key = key._replace(read_only=True)
        elif word == "operator":
            key = key._replace(operator=True)
        elif word.startswith("db="):
            patterns = tuple(unquote(part, errors="strict") for part in word.removeprefix("db=").split(","))
            for pattern in patterns:
                check_db_name(pattern)
            key = key._replace(db_patterns=patterns)
        else:
            raise ValueError
    return key


def _parse_limits(words: list[str]) -> Limits:
    settings = [(name, text) for name, _, text in (word.partition("=") for word in words[1:])]
    if not settings or not ACCOUNT.fullmatch(words[0]) or len(dict(settings)) != len(settings):
        raise ValueError
    return Limits(words[0], {name: parse_limit(name, text) for name, text in settings})


def _write_number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _check_repetitions(lines: tuple[Line, ...]) -> None:
    """Refuse what would leave open which of two lines counts."""
    seen: dict[tuple[str, str], Key | Limits] = {}
    for number, line in enumerate(lines, start=1):
        if isinstance(line, Key | Limits):
            first = seen.setdefault((line.account, line.key_hash if isinstance(line, Key) else ""), line)
            if isinstance(line, Limits) and line is not first:
                raise ConfigurationError(f"line {number}: a second line with limits of one account")
            if line != first:
                raise ConfigurationError(f"line {number}: a key that an earlier line has with other flags")
