# SPDX-License-Identifier: Apache-2.0
"""The run folder: run.json says what ran, records-<i>of<n>.jsonl hold one line per finished row.

Made to be killed at any moment: a record is one append, on the disk before the next row starts. A
line that was torn is dropped and its row runs again. Every shard has its own file and its own lock;
all files together are the run, so the number of shards may change between starts.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from pathlib import Path

from ..cli import CommandError
from ..cli.run import write_json
from .jobs import record_key

FORMAT = 1  # of the folder; raised when an old reader would misread a new folder
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some cluster filesystems
RECORDS = re.compile(r"records-(\d+)of(\d+)\.jsonl")
# Identity fields {task, text or method: SHA-256} that may gain entries in the same folder.
GROWS = ("data", "texts", "method_files")


def plain(value):
    """Numbers and lists instead of tensors and numpy values: what json.dumps asks for."""
    for name in ("tolist", "item"):
        if hasattr(value, name):
            return getattr(value, name)()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} cannot be kept in a record")


def to_line(record):
    """One line of UTF-8. Characters at which some readers split lines are escaped."""
    text = json.dumps(record, ensure_ascii=False, default=plain)
    for mark in ("\u2028", "\u2029", "\x85"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, from a tokenizer that cuts characters
        return json.dumps(record, default=plain).encode() + b"\n"


def read_file(path):
    """(records, damaged line numbers) of one file; a torn last line is neither."""
    records, damaged = [], []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: nothing, or torn
        try:
            record = json.loads(line)
            record_key(record), record["status"]
        except (ValueError, KeyError, TypeError):
            damaged.append(number)
        else:
            records.append(record)
    return records, damaged


def final(records):
    """{key: record}: the one that counts of each key. A row that worked wins, then the later."""
    found = {}
    for record in records:
        key = record_key(record)
        old = found.get(key)
        if old is None or _rank(record) >= _rank(old):
            found[key] = record
    return found


def _rank(record):
    return record["status"] == "ok", record.get("time", 0.0)


def read_records(folder, say=lambda text: None):
    """Every record of a run folder, in the order of files and lines; `say` hears of damage."""
    records = []
    for path in sorted(Path(folder).glob("records-*.jsonl")):
        if RECORDS.fullmatch(path.name):
            found, damaged = read_file(path)
            records += found
            if damaged:
                say(f"{path}: line {', '.join(map(str, damaged[:5]))} is no record and is ignored")
    return records


def read(folder):
    """(run, {key: record}) of a run folder; CommandError if it is none."""
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{folder} holds no run.json: not a run folder") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from error
    if run.get("format") != FORMAT:
        raise CommandError(f"{path} has format {run.get('format')}; this version reads {FORMAT}")
    return run, final(read_records(folder))


def digest(value):
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def differences(old, new, growing=GROWS):
    """[(field, old value, new value)] where two identities disagree; dots lead into dictionaries.

    Fields named in `growing` may have entries on one side only.
    """
    found = []
    for name in sorted({*old, *new}):
        absent = {} if name in growing else None
        a, b = old.get(name, absent), new.get(name, absent)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if name in growing:
                shared = {*a} & {*b}
                a, b = ({key: x[key] for key in shared} for x in (a, b))
            found += [(f"{name}.{field}", x, y) for field, x, y in differences(a, b, ())]
        else:
            found.append((name, a, b))
    return found


@contextlib.contextmanager
def _exclusive(path):
    """Hold the lock file `path`, waiting for it."""
    with open(path, "a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """A run folder that one process appends to. shard: (i, n) with 0 <= i < n."""

    def __init__(self, folder, shard=(0, 1), say=lambda text: None):
        self.folder, self.shard, self.say = Path(folder), shard, say
        stem = f"records-{shard[0]}of{shard[1]}"
        self.path, self.lock_path = self.folder / f"{stem}.jsonl", self.folder / f"{stem}.lock"
        self._file = self._lock = None

    def open(self, run):
        """Take the shard's lock, compare with what is there, write run.json; the final records.

        run: dictionary for run.json with at least bench, identity, methods {label: parameters} and
        expected {label: {task: {length: rows}}}. Raises CommandError if another process holds the
        shard or the folder belongs to a run that differs.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            with _exclusive(self.folder / "run.lock"):
                self._write_run(json.loads(json.dumps(run, default=plain)))
            self._mend()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise CommandError(f"--out {self.folder}: {error}") from error
        return final(read_records(self.folder, self.say))

    def _take_lock(self):
        self._lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 200).decode(errors="replace").strip() or "unknown"
            self.close()
            raise CommandError(
                f"another process ({holder}) is writing {self.path}; wait for it or stop it, give "
                "each process its own --shard i/n, or another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.say(f"{self.folder} cannot lock files: start one process per shard only")
        os.ftruncate(self._lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._lock, f"pid {os.getpid()} on {socket.gethostname()}, {since}\n".encode())

    def _write_run(self, run):
        path = self.folder / "run.json"
        run = {"format": FORMAT} | run
        if path.exists():
            old, _ = read(self.folder)
            self._compare(old, run)
            self._say_changes(old, run)
            run = self._merge(old, run)
        elif read_records(self.folder):
            raise CommandError(f"--out {self.folder} holds records but no run.json that says "
                               "what they are: give another --out")  # fmt: skip
        run["identity_sha256"] = digest(run["identity"])
        write_json(path, run)

    def _compare(self, old, new):
        if old["bench"] != new["bench"]:
            found = [("bench", old["bench"], new["bench"])]
        else:  # methods may be added, not changed
            both = [{k: run["methods"][k] for k in old["methods"] if k in new["methods"]}
                    for run in (old, new)]  # fmt: skip
            found = differences(old["identity"], new["identity"])
            found += [(f"method {name}", x, y) for name, x, y in differences(*both, ())]
        if found:
            lines = [f"  {name}: {a!r} there, {b!r} now" for name, a, b in found[:6]]
            raise CommandError(
                f"--out {self.folder} holds a run that differs in {found[0][0]}:\n"
                + "\n".join(lines)
                + "\ngive another --out, or the options of that run"
            )

    def _say_changes(self, old, new):
        """Rows of other versions or machines may stand side by side; the user should know."""
        for name in ("versions", "machine"):
            changed = differences(old.get(name, {}), new.get(name, {}))
            for field, before, now in changed:
                if field.partition(".")[0] not in ("threads", "device", "backend"):
                    self.say(f"note: the first rows here ran with {field} {before}, this start "
                             f"has {now}")  # fmt: skip

    @staticmethod
    def _merge(old, new):
        """The first start's description with what this start adds."""
        merged = old | {"methods": old["methods"] | new["methods"]}
        merged["identity"] = dict(old["identity"])
        for name in GROWS:
            if name in new["identity"]:
                merged["identity"][name] = old["identity"].get(name, {}) | new["identity"][name]
        expected = merged["expected"] = json.loads(json.dumps(old["expected"]))
        for label, tasks in new["expected"].items():
            for task, lengths in tasks.items():
                known = expected.setdefault(label, {}).setdefault(task, {})
                for length, rows in lengths.items():
                    known[length] = max(rows, known.get(length, 0))
        merged["runs"] = old.get("runs", []) + new.get("runs", [])
        return merged

    def _mend(self):
        """Cut off a line that a kill or a full disk has torn."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb+") as file:
            whole = file.read()
            keep = whole.rfind(b"\n") + 1
            if keep < len(whole):
                file.truncate(keep)
                self.say(f"{self.path.name}: dropped a torn last line; its row runs again")

    def append(self, record):
        """Write one record, on the disk when this returns. TypeError if JSON cannot hold it."""
        line = to_line(record)
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise CommandError(f"{self.path}: {error}; the rows before this one are kept, "
                               "the same command goes on") from error  # fmt: skip

    def close(self):
        for handle in (self._file, self._lock):
            if handle is not None:
                os.close(handle)
        self._file = self._lock = None
