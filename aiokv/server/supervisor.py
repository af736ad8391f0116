"""A supervisor of several workers behind one address.

It holds the listening sockets and serves nothing itself, so that it lives as long as the service. It hears signals, starts
workers again when they die, and replaces them one by one when the configuration has changed.
"""

import contextlib
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from aiokv.errors import AioKVError, ConfigurationError
from aiokv.server import seat as seats
from aiokv.server.access_file import read_access_file
from aiokv.server.announce import address_of, reload_line, say, start_line
from aiokv.server.listening import Listener
from aiokv.server.options import ServerOptions, changed_keys, check_exposure, check_reload
from aiokv.server.seat import Seat
from aiokv.server.statistics import make_memory_file, retire
from aiokv.server.systemd import Notifier

HANG_SECONDS = 10.0
"""A worker whose event loop stands still for so long is killed, and started again: well before a call's 30 s are over."""
_TICK_SECONDS = 1.0
# How long a worker may take to end beyond the time of its drain, and after it was told to end at once.
_END_SECONDS = 5.0
_ABORT_SECONDS = 1.0
# A stop signal that comes so soon after the first is the same one: `timeout` signals its child and its group.
_SECOND_SIGNAL_SECONDS = 0.5
# How long a worker that replaces another may take to start.
_START_SECONDS = 60.0
_FAILED = 3
# Statuses of a worker that has said why it cannot start: wrong usage, or a store or a file that failed.
_EXPLAINED = (2, _FAILED)
# How long a worker waits for its next start where only the access file must be fixed.
_ACCESS_SECONDS = 2.0
# Options that the listening sockets and the counters have been made for.
_FIXED = ("host", "port", "workers")


class RestartWait:
    """How long a worker that has died waits for its next start: 0.1 s, doubling to 10 s; 0.1 s again after it ran 60 s."""

    _LEAST, MOST, _WELL = 0.1, 10.0, 60.0

    def __init__(self) -> None:
        self._seconds = self._LEAST

    def next(self, ran_seconds: float, most: float = MOST) -> float:
        """Return the next wait.

        Args:
            ran_seconds: How long the worker ran.
            most: The longest wait, in seconds.

        Returns:
            Seconds.
        """
        if ran_seconds >= self._WELL:
            self._seconds = self._LEAST
        seconds, self._seconds = min(self._seconds, most), min(self._seconds * 2, most)
        return seconds


class _Worker:
    """One worker process, as its supervisor sees it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, row: int, options: ServerOptions) -> None:
        self.process = process
        self.channel = channel
        self.row = row
        self.options = options
        self.is_ready = False
        self.started = self.heard = time.monotonic()
        # When it is killed.
        self.deadline: float | None = None

    def tell(self, command: bytes) -> None:
        with contextlib.suppress(OSError):
            self.channel.send(command)

    def end(self, command: bytes, seconds: float) -> None:
        self.tell(command)
        deadline = time.monotonic() + seconds
        self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)


class _Slot:
    """The place of one worker: who runs there, who comes next, and when."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.worker: _Worker | None = None
        self.newcomer: _Worker | None = None
        self.due: float | None = None
        self.wait = RestartWait()
        self.has_failed = False


class Supervisor:
    """The parent of the workers.

    Args:
        read_options: Return the options; called again at SIGHUP.
        listeners: What each worker accepts on.
        notifier: How systemd hears of it.
    """

    def __init__(self, read_options: Callable[[], ServerOptions], listeners: Sequence[Listener], notifier: Notifier) -> None:
        self._read_options = read_options
        self._options = read_options()
        self._notifier = notifier
        self._slots = [_Slot(listener) for listener in listeners]
        self._selector = selectors.DefaultSelector()
        # Workers that were replaced, until they have ended.
        self._leaving: list[_Worker] = []
        # One more than workers: while one is replaced, there are two.
        self._rows = set(range(len(listeners) + 1))
        self._statistics = make_memory_file()
        self._signals: list[int] = []
        self._stop_signal: int | None = None
        self._stopped_at = 0.0
        self._is_announced = False
        # The options of a roll count once every worker has started with them.
        self._good_options = self._options
        self._is_rolling = False
        self._next_alive = 0.0
        self._status = 0
        self._has_terminal = os.isatty(0)

    def run(self) -> int:
        """Serve until a signal ends it.

        Returns:
            The exit status.

        Raises:
            AioKVError: An option cannot work.
        """
        warning = check_exposure(self._options, self._slots[0].listener.hosts)
        if warning:
            say(f"warning: {warning}")
        with self._heard_signals():
            # One opens the store alone at first: it may have to bring its file up to date, or to check it.
            for slot in self._slots:
                self._start(slot)
            while self._stop_signal is None or self._workers():
                for key, _ in self._selector.select(self._seconds_to_wait()):
                    key.data()
                self._handle_signals()
                self._end_the_hung()
                if self._stop_signal is None:
                    self._fill_slots()
                    self._replace_one()
        return self._status

    @contextlib.contextmanager
    def _heard_signals(self) -> Generator[None]:
        """Collect signals, and wake the selector."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda: ours.recv(64))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        yield

    def _workers(self) -> list[_Worker]:
        present = (worker for slot in self._slots for worker in (slot.worker, slot.newcomer) if worker is not None)
        return [*present, *self._leaving]

    def _seconds_to_wait(self) -> float:
        dues = [slot.due - time.monotonic() for slot in self._slots if slot.due is not None]
        watchdog = [self._notifier.watchdog_seconds / 4] if self._notifier.watchdog_seconds else []
        return max(0.0, min([_TICK_SECONDS, *dues, *watchdog]))

    def _start(self, slot: _Slot) -> None:
        """Start a worker: the slot's, or the one that will replace it."""
        options = self._options
        is_newcomer = slot.worker is not None
        slot.due = None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        row = min(self._rows)
        # The file is checked once, and not whenever a worker starts again.
        is_first = not self._is_announced and slot is self._slots[0]
        given = {**options.__dict__, "quick_check": options.quick_check and is_first}
        waits = not self._is_announced and not is_first
        try:
            slot.listener.open()
            listeners = tuple(bound.fileno() for bound in slot.listener.sockets)
            seat = Seat(given, theirs.fileno(), listeners, self._statistics, row, len(self._slots) + 1, waits)
            environment = dict(os.environ)
            seat.put(environment)
            # The command of this very process. A group of its own: Ctrl-C reaches the supervisor alone, which passes it on.
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, *sys.orig_argv[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=seat.descriptors,
                process_group=0,
            )
        except OSError as error:
            ours.close()
            self._start_later(slot, 0.0, f"a worker cannot be started ({error.strerror})")
            return
        finally:
            theirs.close()
        self._rows.remove(row)
        worker = _Worker(process, ours, row, options)
        if is_newcomer:
            slot.newcomer = worker
            worker.deadline = worker.started + _START_SECONDS
        else:
            slot.worker = worker
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(slot, worker))

    def _start_later(self, slot: _Slot, ran_seconds: float, reason: str) -> None:
        most = RestartWait.MOST
        try:
            if self._options.access_file is not None:
                read_access_file(Path(self._options.access_file))
        except ConfigurationError as error:
            reason, most = f"{reason}, and none can start: {error}", _ACCESS_SECONDS
        seconds = slot.wait.next(ran_seconds, most)
        slot.due = time.monotonic() + seconds
        say(f"{reason}; the next start is in {seconds:g} s")

    def _hear(self, slot: _Slot, worker: _Worker) -> None:
        try:
            said = worker.channel.recv(4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            said = b""
        if not said:
            self._on_end(slot, worker)
            return
        worker.heard = time.monotonic()
        if seats.READY in said and not worker.is_ready:
            worker.is_ready = True
            self._on_ready(slot, worker)

    def _on_ready(self, slot: _Slot, worker: _Worker) -> None:
        slot.has_failed = False
        if worker is slot.newcomer:
            old, slot.worker, slot.newcomer = slot.worker, worker, None
            worker.deadline = None
            slot.due = None
            if old is not None:
                self._leaving.append(old)
                old.end(seats.DRAIN, self._drain_seconds())
        if self._is_announced or self._stop_signal is not None:
            return
        if slot is self._slots[0]:
            for other in self._workers():
                other.tell(seats.OPEN)
        if all(other.worker is not None and other.worker.is_ready for other in self._slots):
            self._is_announced = True
            line = start_line(self._options, self._address())
            say(line)
            self._notifier.ready(line)

    def _on_end(self, slot: _Slot, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        worker.channel.close()
        status = worker.process.wait()
        self._rows.add(worker.row)
        self._retire(worker.row)
        ran_seconds = time.monotonic() - worker.started
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if worker in self._leaving:
            self._leaving.remove(worker)
            return
        is_newcomer = worker is slot.newcomer
        if is_newcomer:
            slot.newcomer = None
        else:
            slot.worker = None
        if self._stop_signal is not None:
            return
        if not self._is_announced:
            # What cannot start at all is an error, not a fault that passes. The worker has said which.
            if status not in _EXPLAINED:
                say(f"worker {worker.process.pid} ended {how} before it was ready")
            self._status = status if status in _EXPLAINED else _FAILED
            self._stop(signal.SIGTERM)
            return
        if is_newcomer and self._options != self._good_options:
            self._options = self._good_options
            say("the configuration is taken back: a worker does not start with it")
        if slot.newcomer is None and (slot.worker is None or slot.worker.options != self._options):
            if slot.worker is None and slot.has_failed and not worker.is_ready:
                slot.listener.close()
            slot.has_failed = not worker.is_ready
            self._start_later(slot, ran_seconds, f"worker {worker.process.pid} ended {how}")

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP and (not self._has_terminal or os.isatty(0)):
                self._reload()
            elif self._stop_signal is None:
                # A closed terminal stops the service too: nobody could end it by Ctrl-C any more.
                say("stopping, finishing what is under way")
                self._stop(number)
            elif number != signal.SIGHUP and time.monotonic() - self._stopped_at >= _SECOND_SIGNAL_SECONDS:
                say("ended at once by a second signal; open connections are cut")
                self._status = 128 + number
                for worker in self._workers():
                    worker.end(seats.ABORT, _ABORT_SECONDS)

    def _stop(self, number: int) -> None:
        self._stop_signal, self._stopped_at = number, time.monotonic()
        self._notifier.stopping("finishing what is under way")
        for slot in self._slots:
            slot.due = None
            # The workers have their own; ours would keep connections waiting that nobody accepts.
            for bound in slot.listener.sockets:
                bound.close()
        for worker in self._workers():
            worker.end(seats.DRAIN, self._drain_seconds())

    def _reload(self) -> None:
        if self._stop_signal is not None or not self._is_announced:
            return
        self._notifier.reloading()
        try:
            options = self._read_options()
            check_exposure(options, self._slots[0].listener.hosts)
            check_reload(self._options, options)
        except AioKVError as error:
            say(f"the configuration is not reloaded, the present one stays: {error}")
            options = self._options
        kept = {name: getattr(self._options, name) for name in _FIXED}
        reloadable = options._replace(**kept)
        if options != reloadable:
            say(f"changed, and in force after a restart: {', '.join(changed_keys(reloadable, options))}")
            options = reloadable
        if options == self._options:
            for worker in self._workers():
                worker.tell(seats.RELOAD)
            say(reload_line(options))
            self._notifier.ready("serving")
        else:
            say(f"the workers are replaced one by one; changed: {', '.join(changed_keys(self._options, options))}")
            self._options, self._is_rolling = options, True

    def _end_the_hung(self) -> None:
        now = time.monotonic()
        for worker in self._workers():
            if worker.deadline is not None and now >= worker.deadline:
                worker.process.kill()
            elif worker.is_ready and now - worker.heard >= HANG_SECONDS:
                say(f"worker {worker.process.pid} has hung for {HANG_SECONDS:g} s and is killed")
                # Once.
                worker.heard = now
                worker.process.kill()
        if self._notifier.watchdog_seconds is not None and now >= self._next_alive:
            self._next_alive = now + self._notifier.watchdog_seconds / 2
            self._notifier.alive()

    def _fill_slots(self) -> None:
        for slot in self._slots:
            if slot.worker is None and slot.newcomer is None and slot.due is not None and time.monotonic() >= slot.due:
                self._start(slot)

    def _replace_one(self) -> None:
        """Go on with a roll: a new worker is ready before the old one drains, and one is replaced at a time."""
        if not self._is_announced or self._leaving or any(slot.newcomer for slot in self._slots):
            return
        outdated = [slot for slot in self._slots if slot.worker is not None and slot.worker.options != self._options]
        if outdated:
            if outdated[0].due is None or time.monotonic() >= outdated[0].due:
                self._start(outdated[0])
        elif self._is_rolling and all(slot.worker and slot.worker.is_ready for slot in self._slots):
            self._is_rolling = False
            if self._options != self._good_options:
                self._good_options = self._options
                say("all workers are replaced")
            self._notifier.ready("serving")

    def _retire(self, row: int) -> None:
        """Mark a worker's figures as those of one that has ended."""
        # The file has no size before the first worker has given it one.
        if os.fstat(self._statistics).st_size:
            with mmap.mmap(self._statistics, 0) as rows:
                retire(rows, row)

    def _drain_seconds(self) -> float:
        return self._options.drain_delay_seconds + self._options.drain_seconds + _END_SECONDS

    def _address(self) -> str:
        return address_of(self._slots[0].listener.sockets[0], is_tls=self._options.tls_cert is not None)
