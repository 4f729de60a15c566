# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a tqdm bar on a terminal, else a plain line every 30 seconds."""

import sys
import threading
import time

PLAIN_EVERY = 30.0  # seconds


def clock(seconds):
    """Seconds as 5:03 or 2:05:03."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Rows done, the row that runs, the running score, time left by remaining cost.

    total: rows (of each method) to do; cost: theirs together. quiet: say nothing.
    """

    def __init__(self, total, cost, quiet=False, stream=None):
        self.total, self.cost, self.quiet = total, max(cost, 1e-9), quiet
        self.stream = sys.stderr if stream is None else stream
        self.done = self.failed = 0
        self.cost_done, self.start = 0.0, time.monotonic()
        self.at, self.running = "", ""
        self.bar, self._over = None, threading.Event()

    def __enter__(self):
        if not self.quiet and self.total:
            if self.stream.isatty():
                self.bar = self._tqdm()
            if self.bar is None:
                threading.Thread(target=self._plain, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._over.set()
        if self.bar is not None:
            self.bar.close()
        elif not self.quiet and self.total:
            print(self.line(), file=self.stream, flush=True)

    def _tqdm(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        form = "{percentage:3.0f}%|{bar:20}| {desc}"  # tqdm's own ETA counts rows, not their cost
        return tqdm(total=self.cost, file=self.stream, bar_format=form, dynamic_ncols=True)

    def _plain(self):
        while not self._over.wait(PLAIN_EVERY):
            print(self.line(), file=self.stream, flush=True)

    def left(self):
        """Seconds left, from the cost of what is done; None before the first row is."""
        spent = time.monotonic() - self.start
        if not self.cost_done:
            return None
        return spent * max(self.cost - self.cost_done, 0.0) / self.cost_done

    def line(self):
        left = self.left()
        parts = [f"{self.done:,} of {self.total:,} rows", clock(time.monotonic() - self.start)]
        if self.done < self.total:
            parts.append("left " + ("?" if left is None else clock(left)))
            parts.append(self.at)
        parts += [self.running, f"{self.failed} failed" if self.failed else ""]
        return "  ".join(part for part in parts if part)

    def begin(self, text):
        """A row starts: what runs now."""
        self.at = text
        self._show()

    def end(self, cost, failed, running=""):
        """A row is done; running: the bench's running score."""
        self.done, self.failed = self.done + 1, self.failed + bool(failed)
        self.cost_done += cost
        self.running = running
        if self.bar is not None:
            self.bar.update(min(cost, self.cost - self.bar.n))
        self._show()

    def _show(self):
        if self.bar is not None:
            self.bar.set_description_str(self.line())

    def say(self, text):
        """A line that stays, above the bar."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
