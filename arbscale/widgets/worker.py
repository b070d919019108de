"""Long work in a thread beside the kernel's, so that it still answers requests and "cancel"."""

from __future__ import annotations

import threading
from collections.abc import Callable

Check = Callable[[], None]
"""`check()` raises `Cancelled` once the work is not wanted any more."""


class Cancelled(Exception):
    """The work was cancelled, or newer work has taken its place."""


class Worker:
    """Runs one piece of work at a time; newer work cancels the older and follows it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[Check], None]) -> None:
        """Cancel what runs, and call `work(check)` once it has ended."""
        self.cancel()
        stop, before = threading.Event(), self._thread

        def check() -> None:
            if stop.is_set():
                raise Cancelled

        def run() -> None:
            if before is not None:
                before.join()
            try:
                check()
                work(check)
            except Cancelled:
                pass

        self._stop = stop
        self._thread = threading.Thread(target=run, name="arbscale-explorer", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Ask what runs to stop at its next check."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the newest work has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
