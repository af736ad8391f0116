"""Watches of one process: from the thread that changes a value to the loops that read of it."""

import asyncio
import threading
from collections.abc import Sequence

from aiokv.backends.watching import HEARTBEAT_SECONDS, MAX_QUEUED_CHANGES, Alive, Changed, Lost, Watch


class _Feed:
    """What has changed and has not yet been passed to a watch's loop."""

    __slots__ = ("inbox", "is_known", "is_scheduled", "timer", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.inbox: list[Changed | Lost] = []
        self.is_known = True
        self.is_scheduled = False
        self.timer: asyncio.TimerHandle | None = None


class Watchers:
    """The watches of each namespace; `notify` may be called from any thread."""

    def __init__(self) -> None:
        self.feeds: dict[str, list[_Feed]] = {}
        """Empty where nobody watches, so that a writer can tell at no cost."""
        self._lock = threading.Lock()

    def watch(self, db_name: str) -> Watch:
        """Begin a watch for the running loop; its first event is `Lost`.

        Args:
            db_name: The namespace.

        Returns:
            The watch.
        """
        watch = Watch(lambda _: self._close(db_name, feed))
        feed = _Feed(watch)
        with self._lock:
            for name in list(self.feeds):
                for other in list(self.feeds[name]):
                    if other.watch.loop.is_closed():
                        self._forget(name, other)
            self.feeds.setdefault(db_name, []).append(feed)
        watch.notify(Lost())
        feed.timer = watch.loop.call_later(HEARTBEAT_SECONDS, self._beat, feed)
        return watch

    def notify(self, db_name: str, changes: Sequence[Changed]) -> None:
        """Pass changes to the watches of a namespace; calls that follow one another keep their order.

        Args:
            db_name: The namespace.
            changes: The changes, in their order.
        """
        with self._lock:
            for feed in list(self.feeds.get(db_name, ())):
                loop = feed.watch.loop
                if loop.is_closed():
                    self._forget(db_name, feed)
                    continue
                if len(feed.inbox) + len(changes) > MAX_QUEUED_CHANGES:
                    # Its loop is busy with something else; what waits for it has a bound, too.
                    feed.inbox = [Lost()]
                else:
                    feed.inbox.extend(changes)
                if not feed.is_scheduled:
                    try:
                        loop.call_soon_threadsafe(self._pass_on, feed)
                    except RuntimeError:  # It was closed just now.
                        self._forget(db_name, feed)
                    else:
                        feed.is_scheduled = True

    def after_fork(self) -> None:
        """Forget all watches: their loops run in the parent; call this in the child."""
        self._lock = threading.Lock()
        for feeds in self.feeds.values():
            for feed in feeds:
                feed.is_known = False
        self.feeds = {}

    def _pass_on(self, feed: _Feed) -> None:
        with self._lock:
            events, feed.inbox = feed.inbox, []
            feed.is_scheduled = False
        for event in events:
            feed.watch.notify(event)

    def _beat(self, feed: _Feed) -> None:
        if not feed.is_known:
            # In a child that goes on with its parent's loop: nobody tells this watch of changes any more.
            feed.watch.close()
            return
        self._pass_on(feed)
        feed.watch.notify(Alive())
        feed.timer = feed.watch.loop.call_later(HEARTBEAT_SECONDS, self._beat, feed)

    def _close(self, db_name: str, feed: _Feed) -> None:
        if feed.timer is not None:
            feed.timer.cancel()
        with self._lock:
            self._forget(db_name, feed)

    def _forget(self, db_name: str, feed: _Feed) -> None:
        feeds = self.feeds.get(db_name, [])
        if feed in feeds:
            feeds.remove(feed)
        if not feeds:
            self.feeds.pop(db_name, None)
