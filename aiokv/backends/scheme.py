"""What the registry knows of the URLs of one scheme, and what a program may set for the backends behind them."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from aiokv.backends.base import Backend, HostingOptions
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions, check_key_form
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.redis.options import RedisOptions
from aiokv.record import Record

if TYPE_CHECKING:
    from urllib.parse import SplitResult  # costly to import


class ClientOptions(Record, kw_only=True):
    """What a program may set for a backend behind a URL; schemes to which it does not apply ignore it.

    Args:
        credentials: `"<id>:<secret>"`, an object with `authorization`, or None for those of the environment.
        retry: Attempts, timeouts and waits.
        http: The connection pool.
        redis: Durability and connections.
        hedge: When a late read is sent a second time; None never.
        hosting: What a server asks of the file that holds its values; None where the values are a program's own.

    Raises:
        TypeError: An option is of another type.
        CredentialsError: `credentials` is a text of another form.
    """

    credentials: str | Credentials | None = None
    retry: RetryPolicy = RetryPolicy()
    http: HttpOptions = HttpOptions()
    redis: RedisOptions = RedisOptions()
    hedge: HedgePolicy | None = None
    hosting: HostingOptions | None = None

    def __post_init__(self) -> None:
        credentials = self.credentials
        if isinstance(credentials, str):
            check_key_form(credentials, "credentials")
        elif credentials is not None and (isinstance(credentials, type) or not isinstance(credentials, Credentials)):
            raise TypeError(
                f"credentials must be '<id>:<secret>' or have `async def authorization`, not {type(credentials).__name__}"
            )
        if not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {type(self.retry).__name__}")
        if not isinstance(self.http, HttpOptions):
            raise TypeError(f"http must be HttpOptions, not {type(self.http).__name__}")
        if not isinstance(self.redis, RedisOptions):
            raise TypeError(f"redis must be RedisOptions, not {type(self.redis).__name__}")

    @classmethod
    def of_arguments(
        cls,
        credentials: str | Credentials | None,
        retry: RetryPolicy | None,
        http: HttpOptions | None,
        hedge: bool | HedgePolicy,  # noqa: FBT001 (as a store's caller passes it)
        redis: RedisOptions | None = None,
    ) -> Self:
        """Build the options from the arguments of a store.

        Args:
            credentials: As for the class.
            retry: As for the class; None takes the default.
            http: As for the class; None takes the default.
            hedge: True takes the default policy, False none.
            redis: As for the class; None takes the default.

        Returns:
            The options, checked.
        """
        return cls(
            credentials=credentials,
            retry=cls.retry if retry is None else retry,
            http=cls.http if http is None else http,
            hedge=_hedge_policy(hedge),
            redis=cls.redis if redis is None else redis,
        )

    def derive(
        self,
        timeout: float | timedelta | None,
        retry: RetryPolicy | None,
        hedge: bool | HedgePolicy | None,  # noqa: FBT001 (as a store's caller passes it)
    ) -> Self:
        """Return these options with some of them replaced.

        Args:
            timeout: The total time of a call, in seconds or as a `timedelta`; None leaves it.
            retry: The policy, or None to leave it.
            hedge: The policy, True, False, or None to leave it.

        Returns:
            The other options, checked.
        """
        other = self._replace(
            retry=self.retry if retry is None else retry, hedge=self.hedge if hedge is None else _hedge_policy(hedge)
        )
        return other if timeout is None else other._replace(retry=other.retry.within(timeout))


class Scheme(Record, kw_only=True):
    """A row of the table: what is to be known of the URLs of one scheme.

    Args:
        open: Make the backend of a canonical URL; it must neither read nor send anything before the backend's first call.
        check: Raise `ConfigurationError` where a URL, given whole and split, is not acceptable. User information, queries and
            fragments are refused before that.
        canonical: Return the one form of all URLs that name the same place.
        with_client_options: Return the view of a shared backend that obeys other `retry` and `hedge`; None where `retry`,
            `http` and `hedge` mean nothing to the backend.
        takes_credentials: Whether `credentials` mean something to the backend.
        credentials_variable: The variable of the environment that can hold them, for messages.
        takes_quick_check: Whether the backend obeys `hosting.quick_check`; elsewhere that option is refused.
        module: A module to import ahead of the first call, or None.
        example: How such a URL is written, for messages.
    """

    open: Callable[[str, ClientOptions], Backend]
    check: "Callable[[str, SplitResult], None]" = lambda _url, _parts: None
    canonical: Callable[[str], str] = str
    with_client_options: Callable[[Backend, ClientOptions], Backend] | None = None
    takes_credentials: bool = False
    credentials_variable: str = "AIOKV_KEY"
    takes_quick_check: bool = False
    module: str | None = None
    example: str = ""


def _hedge_policy(hedge: bool | HedgePolicy) -> HedgePolicy | None:  # noqa: FBT001 (as the caller passed it)
    if not isinstance(hedge, bool | HedgePolicy):
        raise TypeError(f"hedge must be True, False or a HedgePolicy, not {type(hedge).__name__}")
    return (HedgePolicy() if hedge else None) if isinstance(hedge, bool) else hedge


def refuse_with_backend(**options: object) -> None:
    """Refuse options that only the backend of a URL obeys.

    Args:
        options: The options of a store whose backend was passed in; None where one was not given.

    Raises:
        TypeError: One was given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TypeError(
            f"{' and '.join(given)} cannot be combined with backend=: only the backend that a URL names takes it; an object "
            "that is passed in has its own settings, so give them to that object, or pass url= instead"
        )
