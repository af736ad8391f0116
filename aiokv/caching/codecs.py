"""Steps between a result's JSON and what is stored: compression and encryption. Pure."""

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from aiokv.caching.results import NotStorable
from aiokv.errors import ConfigurationError

DEFAULT_MAX_BYTES: Final = 32 * 1024 * 1024

_NONCE_BYTES = 12
_KEY_BYTES = 32


class Codec(Protocol):
    """A step between a result's JSON and what is stored; steps are applied in order, and undone in reverse.

    `context` is all that the entry says beside its data, as JSON: version, namespace, key, schema, start, end of freshness,
    seconds of computation, and the names of the steps that were applied *before* this one. A step can authenticate the context,
    as `Encrypted` does. Such an entry cannot be read under another key, in another store, with other times, or without an
    earlier step. The context does not cover later steps, so such a step belongs last.
    """

    name: str
    """The name that is stored with each entry, without `+`. Another format needs another name."""
    required: bool
    """Whether an entry that has not been through this step is a miss."""

    def encode(self, data: bytes, context: bytes) -> bytes | None:
        """Apply the step.

        Args:
            data: The bytes of the step before.
            context: What to bind the data to; see the class.

        Returns:
            The changed data, or None to pass them on as they are.

        Raises:
            NotStorable: The data cannot be stored; the text is logged. Any other exception does the same, without its text.
        """
        ...

    def decode(self, data: bytes, context: bytes) -> bytes:
        """Undo the step.

        Args:
            data: What `encode` returned, or anything else that the store holds.
            context: What `encode` was given.

        Returns:
            The data that `encode` was given.

        Raises:
            ValueError: The data are not what `encode` made for this context. Any exception makes the entry a miss.
        """
        ...


JSON: tuple[Codec, ...] = ()
"""No step: the result's JSON is stored as it is."""


class Zstd:
    """Compress with Zstandard (needs `aiokv[zstd]`), so that a result well past the limit as JSON may still fit.

    Args:
        min_bytes: Shorter JSON is stored as it is.
        level: 1 (fast) to 22 (small).
        max_bytes: Longer JSON is neither stored nor read, so that no entry can exhaust the memory; 1 or more.

    Raises:
        ConfigurationError: The package zstandard is not installed, or an argument is out of its range.
    """

    name = "zstd"
    required = False

    def __init__(self, *, min_bytes: int = 1024, level: int = 3, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        for argument, number, least in (("min_bytes", min_bytes, 0), ("level", level, 1), ("max_bytes", max_bytes, 1)):
            if type(number) is not int or number < least:
                raise ConfigurationError(f"{argument} of Zstd must be an int of {least} or more, not {_describe(number)}")
        try:
            import zstandard  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise ConfigurationError("Zstd needs the package zstandard: pip install 'aiokv[zstd]'") from error
        if level > zstandard.MAX_COMPRESSION_LEVEL:
            raise ConfigurationError(f"level of Zstd must be at most {zstandard.MAX_COMPRESSION_LEVEL}, not {_describe(level)}")
        self._zstandard = zstandard
        self._min_bytes = min_bytes
        self._level = level
        self._max_bytes = max_bytes

    def __reduce__(self) -> Any:
        return partial(type(self), min_bytes=self._min_bytes, level=self._level, max_bytes=self._max_bytes), ()

    def encode(self, data: bytes, context: bytes) -> bytes | None:  # noqa: ARG002 (compression binds to nothing)
        """Compress; see `Codec.encode`."""
        if len(data) > self._max_bytes:
            raise NotStorable(
                f"its JSON of {len(data):,} bytes is over max_bytes={self._max_bytes:,} of Zstd; raise that, or return less"
            )
        if len(data) < self._min_bytes:
            return None
        # With a checksum: else a bit that changed in the store could make another result.
        return self._zstandard.ZstdCompressor(level=self._level, write_checksum=True).compress(data)

    def decode(self, data: bytes, context: bytes) -> bytes:  # noqa: ARG002 (likewise)
        """Decompress, up to `max_bytes`; see `Codec.decode`."""
        try:
            size_bytes = self._zstandard.frame_content_size(data)
            if not 0 <= size_bytes <= self._max_bytes:
                raise ValueError("the compressed result declares no size, or one over max_bytes")
            # A frame that holds more than it declares is an error here, not more memory.
            return self._zstandard.ZstdDecompressor().decompress(data, max_output_size=size_bytes, allow_extra_data=False)
        except self._zstandard.ZstdError as error:
            raise ValueError("the result is not Zstandard data") from error


class Encrypted:
    """Encrypt with AES-256-GCM (needs `aiokv[crypto]`) and authenticate all that the entry claims; see `Codec`.

    Args:
        key: 32 bytes, or a list of such for rotation: the first encrypts, each decrypts. `Encrypted.new_key()` makes one.

    Raises:
        ConfigurationError: The package cryptography is not installed, or a key is not 32 bytes.
    """

    name = "aesgcm"
    required = True

    def __init__(self, key: bytes | Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 (an extra)
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 (likewise)
        except ImportError as error:
            raise ConfigurationError("Encrypted needs the package cryptography: pip install 'aiokv[crypto]'") from error
        keys: list[object] = [key] if isinstance(key, bytes) or not isinstance(key, Sequence) else list(key)
        ciphers = [AESGCM(one) for one in keys if isinstance(one, bytes) and len(one) == _KEY_BYTES]
        if not keys or len(ciphers) != len(keys):
            raise ConfigurationError(
                f"Encrypted takes a key of {_KEY_BYTES} bytes or a list of such; Encrypted.new_key() makes one"
            )
        self._invalid_tag = InvalidTag
        self._ciphers = ciphers
        # For pickles, which hold them; a function, so that no text of the attributes shows them.
        self._get_keys: Callable[[], list[object]] = lambda: keys

    @staticmethod
    def new_key() -> bytes:
        """Make a key.

        Returns:
            32 random bytes, which are a secret.
        """
        return os.urandom(_KEY_BYTES)

    def __reduce__(self) -> Any:
        return type(self), (self._get_keys(),)

    def __repr__(self) -> str:
        return f"Encrypted(<{len(self._ciphers)} keys>)"

    def encode(self, data: bytes, context: bytes) -> bytes | None:
        """Encrypt; see `Codec.encode`."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, data, context)

    def decode(self, data: bytes, context: bytes) -> bytes:
        """Decrypt with whichever key fits; see `Codec.decode`."""
        nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(nonce, sealed, context)
            except (self._invalid_tag, ValueError):
                continue
        raise ValueError("the result was not encrypted with any of the keys, or not for this entry")


def check_codecs(codec: Codec | Sequence[Codec] | None) -> tuple[Codec, ...]:
    """Check the steps that a function's results go through.

    Args:
        codec: A step, several, or None for none.

    Returns:
        The steps, in order.

    Raises:
        ConfigurationError: One has no `name`, `required`, `encode` or `decode`, a name has a `+`, two have the same, or
            `Encrypted` is not the last.
    """
    given: Any = codec
    if given is None:
        return ()
    steps = (given,) if hasattr(given, "encode") and hasattr(given, "decode") else given
    if not isinstance(steps, Sequence) or isinstance(steps, str | bytes):
        raise ConfigurationError(f"codec must be a codec such as Zstd(), or a list of them, not {type(given).__qualname__}")
    for step in steps:
        if isinstance(step, type):
            raise ConfigurationError(f"codec must be an object, not the class {step.__qualname__}; write {step.__qualname__}()")
        if not (callable(getattr(step, "encode", None)) and callable(getattr(step, "decode", None))):
            raise ConfigurationError(
                f"codec holds a {type(step).__qualname__}, which has no encode and decode; pass one like Zstd()"
            )
        if not isinstance(getattr(step, "required", None), bool):
            raise ConfigurationError(
                f"a codec must say whether it is required, True or False; {type(step).__qualname__} does not"
            )
    names = [getattr(step, "name", None) for step in steps]
    if any(not isinstance(name, str) or not name or "+" in name or not name.isascii() for name in names):
        raise ConfigurationError(f"codecs must have names of ASCII characters without '+', not {names}")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"codecs must have different names, not {names}")
    _check_order(steps)
    return tuple(steps)


def _check_order(steps: Sequence[Any]) -> None:
    for step, after in itertools.pairwise(steps):
        if isinstance(step, Encrypted):
            raise ConfigurationError(
                f"Encrypted must be the last codec, and {type(after).__name__} comes after it: what that does would not be "
                "authenticated, and encrypted data cannot be compressed; write codec=[..., Encrypted(key)]"
            )


def _describe(number: object) -> str:
    return str(number) if type(number) is int else type(number).__qualname__
