# SPDX-License-Identifier: Apache-2.0
"""One start of a bench: run folder, model, first lines, rows, table, exit status."""

import contextlib
import datetime
import signal
import threading
from collections import Counter

import torch

from ..cli import CommandError, models
from . import about, gpus, parallel
from .progress import Progress
from .runner import Runner, deal, to_do
from .session import Session
from .store import Store, final, read_records

COMPLETE, INCOMPLETE, STOPPED = 0, 3, 130
PROBE = 512  # tokens of the prefill that shows which layers a method takes


@contextlib.contextmanager
def interruptible():
    """SIGTERM stops like Ctrl-C inside the block."""

    def stop(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def expected(jobs, labels):
    """{label: {task: {length: rows}}}, keys as JSON has them: what a complete folder holds."""
    tasks = {}
    for job in jobs:
        lengths = tasks.setdefault(job.task, {})
        lengths[str(job.length)] = lengths.get(str(job.length), 0) + 1
    return {label: tasks for label in labels}


class Launch:
    """Everything of one start. `command`: as typed; `path`, `config`: of the model."""

    def __init__(self, bench, args, methods, tokens, plan, jobs, *, path, config, ranks, command):
        self.bench, self.args, self.methods = bench, args, methods
        self.tokens, self.plan, self.jobs = tokens, plan, jobs
        self.path, self.config, self.ranks, self.command = path, config, ranks, command
        self.labels = [method.label for method in methods]
        self.device = ranks.device(args.device)
        self.shard = ranks.shard(args.shard)
        self.mine = deal(jobs, self.shard[1])[self.shard[0]]
        self.folder = args.out
        self.store = None

    def say(self, text=""):
        if self.ranks.first:
            print(text, flush=True)

    # ---- what run.json says ----------------------------------------------------------------------

    def identity(self):
        """The bench's identity and what the frame knows: all that changes a record's value."""
        args = self.args
        files = {
            method.label: [about.sha256_file(path) for path in method.files]
            for method in self.methods if method.files
        }  # fmt: skip
        return {
            **self.plan.identity,
            **({"method_files": files} if files else {}),
            "model": about.model(self.path, self.config, self.tokens.tokenizer),
            "dtype": self.dtype(),
            "max_prompt": args.max_prompt,
            "chat": self.tokens.use_chat,
            "template_args": self.tokens.template_args,
            "seed": args.seed,
        }

    def dtype(self):
        """The dtype the weights will have, as a word; known before they are loaded."""
        if self.args.dtype != "auto":
            return self.args.dtype
        if str(self.path).endswith(".gguf"):
            return "float32"
        config = self.config.get_text_config()
        found = getattr(self.config, "dtype", None) or getattr(config, "dtype", None)
        return str(found or "float32").removeprefix("torch.")

    def run(self):
        """The dictionary of run.json for this start."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        this = {
            "start": now, "command": self.command, "shard": f"{self.shard[0]}/{self.shard[1]}",
            "methods": self.labels, "rows": len(self.jobs), "limit": self.args.limit,
            "tp": self.args.tp, "versions": about.versions(),
            "machine": about.machine(self.device), "git_commit": about.commit(),
        }  # fmt: skip
        arguments = {name: value for name, value in vars(self.args).items() if name != "main"}
        return {
            "bench": self.bench.NAME,
            "identity": self.identity(),
            "methods": {method.label: method.to_dict() for method in self.methods},
            "expected": expected(self.jobs, self.labels),
            "model": {"name": self.args.model, "path": str(self.path), "window": self.tokens.window,
                      "parameters": about.parameters(self.config),
                      "architecture": (self.config.architectures or ["?"])[0]},  # fmt: skip
            "notes": list(self.plan.notes),
            "arguments": arguments,
            **{name: this[name] for name in
               ("start", "command", "versions", "machine", "git_commit")},
            "runs": [this],
        }  # fmt: skip

    # ---- the start -------------------------------------------------------------------------------

    def go(self):
        """Run what is to do; the exit status."""
        self.ranks.start(self.device)
        work = None
        try:
            if self.ranks.first or not self.args.tp:
                self.store = Store(self.folder, self.shard, self.say)
                work = self._open()
            work = self.ranks.share(work)
            self._first_lines(work)
            if work:
                self._rows(work)
        except KeyboardInterrupt:
            self._say_how_to_resume()
            return STOPPED
        finally:
            if self.store:
                self.store.close()
        self.ranks.meet()
        status = self._finish()
        self.ranks.meet()  # a rank that leaves with 3 may cut off what another still prints
        return status

    def spread(self, words):
        """Let one process per GPU of --gpus run the command line `words`; the exit status."""
        world = len(self.args.gpus)
        try:
            statuses = gpus.spread([*words, "--part"], self.args.gpus)
        except KeyboardInterrupt:
            self._say_how_to_resume()
            return STOPPED
        broken = [status for status in statuses if status not in (COMPLETE, INCOMPLETE)]
        if broken:
            self.say(f"\n{len(broken)} of {world} processes ended with {broken[0]}; what is done "
                     f"is kept in {self.folder}, the same command goes on")  # fmt: skip
            return 2 if 2 in broken else INCOMPLETE
        i, n = self.args.shard
        parts = deal(self.jobs, n * world)[i * world : (i + 1) * world]
        self.mine = [job for part in parts for job in part]
        return self._finish()

    def _open(self):
        run = self.run()
        found = self.store.open(run)
        retry = self.args.retry is not None
        self.found = found
        return to_do(self.mine, self.labels, found, retry)

    def _first_lines(self, work):
        self.say(f"bench    {self.bench.NAME}: {self.bench.HELP}")
        for note in self.plan.notes:
            self.say(f"         {note}")
        data = self.plan.identity.get("data") or self.plan.identity.get("texts") or {}
        if isinstance(data, dict) and data:
            parts = [f"{task} {str(sha)[:12]}" for task, sha in data.items()]
            more = f", ... ({len(parts)} in run.json)" if len(parts) > 6 else ""
            self.say(f"data     sha256 {', '.join(parts[:6])}{more}")
        total = len(self.jobs) * len(self.labels)
        todo = sum(len(labels) for _, labels in work)
        here = len(self.mine) * len(self.labels)
        if self.ranks.first and self.store:
            keys = {job.key(label) for job in self.jobs for label in self.labels}
            done = [record for key, record in self.found.items() if key in keys]
            failed = sum(record["status"] != "ok" for record in done)
            also = f" ({failed} failed)" if failed else ""
            self.say(f"rows     {len(self.jobs):,} x {len(self.labels)} methods = {total:,}: "
                     f"{len(done):,} done{also}, {todo:,} to do"
                     + (f" of the {here:,} of shard {self.shard[0]}/{self.shard[1]}"
                        if self.shard[1] > 1 else ""))  # fmt: skip
        self.say(f"out      {self.folder}")

    def _rows(self, work):
        args = self.args
        session = self._load()
        self._check_methods(session)
        cost = sum(job.cost * len(labels) for job, labels in work)
        rows = sum(len(labels) for _, labels in work)
        write = self.store.append if self.store else lambda record: None
        with Progress(rows, cost, quiet=not self.ranks.first) as progress:
            runner = Runner(
                self.bench, session, self.methods, args, write, progress,
                shard=f"{self.shard[0]}/{self.shard[1]}", show=args.show,
            )  # fmt: skip
            runner.run(work)
        if runner.stopped:
            raise CommandError(f"the GPU stopped working ({runner.stopped}); the row it failed in "
                               "is kept as failed, the same command goes on after it")  # fmt: skip

    def _load(self):
        args = self.args
        model, _ = models.load(
            args.model, dtype=args.dtype, device=self.device, say=lambda text: None,
            trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle,
            options=parallel.load_options(self.ranks.tp or 1),
        )  # fmt: skip
        session = Session(model, self.tokens, name=args.model, seed=args.seed, tp=args.tp)
        window = "unknown" if self.tokens.window is None else f"{self.tokens.window:,} tokens"
        where = about.machine(session.device)
        place = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
        split = f", over {self.ranks.tp} ranks" if self.ranks.tp else ""
        self.say(f"model    {args.model}, {session.dtype}, {model.num_parameters() / 1e6:,.0f} M "
                 f"parameters{split}, window {window}, {session.device} ({place})")  # fmt: skip
        for name, value, plain in session.habits():
            self.say(f"         its generation config has {name} = {value} (plain is {plain})")
        return session

    def _check_methods(self, session):
        """One short prefill of each: says what it takes, and finds out now what cannot run."""
        vocabulary = session.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        length = min(PROBE, self.tokens.window or PROBE)
        ids = torch.randint(vocabulary, (length,), generator=generator)
        for method in self.methods:
            try:
                _, counts = session.prefill(ids, method)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise CommandError(f"--method {method.label} cannot run here: {error}") from error
            self.say(f"method   {method.label}: {describe(method, counts, length)}")

    # ---- the end ---------------------------------------------------------------------------------

    def _say_how_to_resume(self):
        if self.args.part:
            return
        found = final(read_records(self.folder))
        keys = {job.key(label) for job in self.jobs for label in self.labels}
        done = len(keys & {*found})
        self.say(f"\nstopped: {done:,} of {len(keys):,} rows are done and kept in {self.folder}; "
                 f"the same command goes on:\n  {self.command}")  # fmt: skip

    def _finish(self):
        found = final(read_records(self.folder))
        everything = [job.key(label) for label in self.labels for job in self.jobs]
        own = [job.key(label) for label in self.labels for job in self.mine]
        present = [found[key] for key in everything if key in found]
        failed = [record for record in present if record["status"] != "ok"]
        missing = len(everything) - len(present)
        allowed = self.args.allow_missing
        good = all(key in found and found[key]["status"] == "ok" for key in own)
        status = COMPLETE if good else INCOMPLETE
        if self.args.part:  # who started the parts says the rest
            return status
        if not missing or allowed:
            shown = [r for r in present if r["status"] == "ok"] if allowed else present
            if allowed and (failed or missing):
                self.say("\nmeans over the rows that worked (--allow-missing)")
            self.say("\n" + self.bench.summary(shown, self.labels))
        if failed or missing:
            self._say_incomplete(failed, missing, len(everything))
        return status

    def _say_incomplete(self, failed, missing, total):
        parts = []
        if failed:
            counts = Counter(record["status"] for record in failed).most_common()
            kinds = ", ".join(f"{n} {status}" for status, n in counts)
            zero = "" if self.args.allow_missing else "; they count as zero"
            parts.append(f"{len(failed)} of {total:,} rows failed ({kinds}){zero}")
        if missing:
            parts.append(f"{missing:,} of {total:,} rows are not done yet")
        self.say(f"\nINCOMPLETE: {', '.join(parts)}")
        for error in list(dict.fromkeys(record["error"] for record in failed))[:3]:
            self.say(f"  {error}")
        if failed:
            self.say("  --retry failed runs them again")
        if missing:
            self.say(f"  when all shards are done: python -m pbs_attn report {self.folder}")


def describe(method, counts, length):
    """What a method did with a prefill of `length` random tokens, in one line."""
    calls, reasons = counts["calls"], counts["reasons"]
    if "stock" in calls:
        return f"the model's own attention in {calls['stock']} layers, not patched"
    taken = sum(n for route, n in calls.items() if route != "dense")
    text = f"{method.ABOUT}; patched {sum(calls.values())} layers"
    if method.kind == "dense":
        return text
    why = f" ({', '.join(f'{word} {n}' for word, n in reasons.items())})" if reasons else ""
    return (f"{text}, {taken} of them sparse and {calls.get('dense', 0)} dense{why} at {length} "
            "tokens; decoding is dense")  # fmt: skip
