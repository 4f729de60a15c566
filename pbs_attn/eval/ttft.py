# SPDX-License-Identifier: Apache-2.0
"""ttft: time to first token, method by method, on real documents of given lengths.

strict: warm-up on the input itself until times settle, then the methods in turn, each round another
one first; every sample is kept. paper: as the paper times it (30 warm-ups on random tokens, then
one generate call per document, method after method; mean). A run that is not timed says beside
each time what was computed and whether the answer is still dense attention's.
"""

import contextlib
import platform

import torch

from .. import methods, patch_model
from ..cli import CommandError, measure
from ..cli.run import cpu_name
from . import parallel, scores, texts, timing, ttft_table
from .jobs import Job, Plan, prompt_cost
from .runner import out_of_memory

NAME = "ttft"
HELP = "time to first token, with density, agreement and the dense kernel beside it"
DEFAULT_METHODS = "full,identity,pbs"
PROTOCOLS = ("strict", "paper")
PAPER_WARMUPS = 30
EXAMPLES = """\
  python -m pbs_attn eval ttft --lengths 2k --repeat 3
      SmolLM2-135M on this machine
  python -m pbs_attn eval ttft --model DIR --device cuda --dtype bfloat16 --text books/*.txt \\
      --method sdpa,full,pbs --lengths 8k..128k,100001
  torchrun --nproc-per-node 4 -m pbs_attn eval ttft --model DIR --device cuda --dtype bfloat16 \\
      --text book.txt --lengths 256k --tp 4 --mlp-chunk 32768"""

describe, running, summary = ttft_table.describe, ttft_table.running, ttft_table.summary


def add_arguments(parser):
    parser.add_argument("--text", nargs="+", metavar="FILE",
                        help="UTF-8 documents, cut to length; shorter ones are repeated and "
                             "marked; demo (default): Newton's Queries")  # fmt: skip
    parser.add_argument("--lengths", default="2k,3000,4k", metavar="LIST",  # 3000: no whole blocks
                        help="tokens: 2k,3000 or 8k..512k, which doubles "
                             "(%(default)s)")  # fmt: skip
    parser.add_argument("--protocol", choices=PROTOCOLS, default="strict")
    parser.add_argument("--repeat", type=int, metavar="N",
                        help="samples per method (10; 5 from 256K on)")  # fmt: skip
    parser.add_argument("--warmups", type=int, metavar="N", help="strict: at most so many (3; 1 "
                        "from 256K on); paper: exactly so many (30)")  # fmt: skip
    parser.add_argument("--mlp-chunk", type=int, default=0, metavar="TOKENS",
                        help="run MLPs so many tokens at a time, for every method alike "
                             "(0: off)")  # fmt: skip


def prepare(args, tokens):
    """strict: a job per text and length; paper: one per length, over all texts."""
    for name in ("repeat", "warmups"):
        value = getattr(args, name)
        if value is not None and value < (name == "repeat"):
            raise CommandError(f"--{name} is {value}; allowed: {int(name == 'repeat')} or more")
    if args.mlp_chunk < 0:
        raise CommandError(f"--mlp-chunk is {args.mlp_chunk}; allowed: 0 (off), or tokens")
    found, lengths = texts.load(args.text), texts.parse_lengths(args.lengths)
    inputs = {text.name: texts.token_ids(tokens, text.text) for text in found}
    notes, jobs = [_note(args)], []
    groups = [[text] for text in found] if args.protocol == "strict" else [found]
    for group in groups:
        for length in lengths:
            cut = [texts.tiled(*inputs[text.name], length) for text in group]
            notes += [
                f"WARNING: {text.name} is repeated {times} times to fill {length:,} tokens; "
                "periodic text is easier than any real one"
                for text, (_, times) in zip(group, cut, strict=True)
                if times > 1
            ]
            beyond = tokens.window is not None and length > tokens.window
            payload = {"inputs": [ids for ids, _ in cut], "beyond": beyond,
                       "tiled": max(times for _, times in cut)}  # fmt: skip
            task = group[0].name if args.protocol == "strict" else "documents"
            cost = prompt_cost(length) * (samples(args, length) + warmups(args, length))
            jobs.append(Job(NAME, task, args.protocol, length, cost, payload))
            if beyond:
                notes.append(
                    f"WARNING: {length:,} tokens are more than the model's window of "
                    f"{tokens.window:,}: the time counts, the answer does not"
                )
    identity = {"texts": {text.name: text.sha256 for text in found}, "repeat": args.repeat,
                "warmups": args.warmups, "mlp_chunk": args.mlp_chunk, "tp": args.tp or 1,
                "threads": args.threads, "machine": machine(args.device)}  # fmt: skip
    return Plan(jobs, identity, list(dict.fromkeys(notes)))


def _note(args):
    if args.protocol == "paper":
        return ("paper: warm-ups on random tokens, then one generate(max_new_tokens=1) per "
                "document, method after method; mean over documents")  # fmt: skip
    return (
        "strict: ids on the device to first token id on the host; warm-up until two times "
        "agree within 2%; methods take turns; density and agreement from a run of their own"
    )


def machine(device):
    """The machine in words: times from another one do not belong into the same folder."""
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()}, {cpu_name()}"


def samples(args, length):
    """Timed runs per method."""
    return args.repeat or (5 if length >= timing.LONG else 10)


def warmups(args, length):
    """Warm-up runs per method, at most."""
    if args.warmups is not None:
        return args.warmups
    if args.protocol == "paper":
        return PAPER_WARMUPS
    return 1 if length >= timing.LONG else 3


def prompt(tokens, job, args):
    """(ids, info) for --dry-run."""
    info = {"tokens": job.length, "cut": 0, "tiled": job.payload["tiled"]}
    return job.payload["inputs"][0].tolist(), info


def work_all(session, chosen, job, args):
    """All methods of a job together: they take turns, so none of them ends before the last."""
    bench = Bench(session, args, job)
    with timing.mlp_chunks(session.model, args.mlp_chunk):
        yield from bench.run(list(chosen))


class Bench:
    """One document, or all of them, at one length."""

    def __init__(self, session, args, job):
        self.session, self.model, self.device = session, session.model, session.device
        self.job, self.args = job, args
        self.ranks = parallel.Group(args.tp, session.device)
        self.inputs = [session.tensor(ids) for ids in job.payload["inputs"]]
        self.last_row = measure.last_row_only(session.model)
        self.failed, self.records, self.memory, self.clocks = {}, {}, {}, {}

    def run(self, chosen):
        """Yields (method, record fields or the exception that ended it). Inside: by label."""
        dense = next((m for m in chosen if m.kind == "dense"), None) or methods.get("full")
        try:
            base = self.look(dense)
        except Exception as error:  # too long for dense, maybe not for the others
            self._fail(dense, error)
            base = None
        for method in chosen:
            self._try(method, lambda m=method: self._beside(m, dense, base))
        base = None
        order = self._paper if self.args.protocol == "paper" else self._strict
        times = order(chosen)
        for method in chosen:
            error = self.failed.get(method.label)
            if error is None:
                fields = self.records[method.label]
                yield method, fields | self._times(method, chosen, *times)
            else:
                yield method, error

    def _try(self, method, call):
        """call(), unless the method has failed; an exception makes it fail, and returns None."""
        if method.label in self.failed:
            return None
        try:
            return call()
        except Exception as error:
            self._fail(method, error)
            return None

    def _fail(self, method, error):
        """Keep the error; without memory, not the frames that still hold what there was of it."""
        self.failed[method.label] = error
        if out_of_memory(error):
            error.__traceback__ = error.__context__ = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def using(self, method):
        """The model under a method, with nothing counted: counting takes time."""
        if method.kind == "stock":
            return contextlib.nullcontext()
        return patch_model(self.model, method)

    def look(self, method):
        """A run that is not timed: (log-probabilities of the first token, record fields)."""
        talk = parallel.Communication(self.device)
        with self.session.using(method) as calls, torch.no_grad(), talk.watch():
            with timing.AttentionKernels() as kernels:
                output = self.model(self.inputs[0], use_cache=True, return_dict=True,
                                    **self.last_row)  # fmt: skip
            logits = output.logits[0, -1].float()
        held = timing.cache_bytes(output.past_key_values)
        del output
        counts = self.ranks.over_heads(self.session.counts(calls))
        fields = {**counts, "backend": self._backend(method, kernels.seen),
                  "first_token": int(logits.argmax()), "cache_gb": held / 1e9}  # fmt: skip
        if self.ranks.size > 1:
            fields |= {"comm_s": self.ranks.largest(talk.seconds), "comm_calls": talk.calls}
        return torch.log_softmax(logits, -1), fields

    def _backend(self, method, seen):
        """The attention kernels that ran, and under which name of transformers if not ours."""
        from .. import build_info

        info = build_info()
        where = "GPU" if self.device.type == "cuda" else info["isa"].get(self.session.dtype, "")
        names = timing.kernel_names(seen, where or info["backend"])
        if method.kind != "stock":
            return names or "torch"
        stock = self.model.config.get_text_config()._attn_implementation
        return f"{stock}: {names}" if names else stock

    def _beside(self, method, dense, base):
        """Look at a method and compare it with dense."""
        found, fields = base if method is dense and base else self.look(method)
        if base is not None:
            fields = fields | {"same_first": fields["first_token"] == base[1]["first_token"],
                               "kl": float(scores.divergence(base[0], found))}  # fmt: skip
        else:
            fields = fields | {"same_first": None, "kl": None}
        self.memory[method.label] = timing.Memory(self.device)
        self.records[method.label] = fields

    def _run(self, method, ids, generate=False):
        """Seconds of one first token; the slowest rank's."""
        call = self._generate if generate else self._first_token
        self.ranks.barrier()
        with self.using(method), self.memory[method.label].watch(), torch.inference_mode():
            seconds, _ = timing.timed(lambda: call(ids), self.device)
        return self.ranks.largest(seconds)

    def _first_token(self, ids):
        output = self.model(ids, use_cache=True, return_dict=True, **self.last_row)
        return int(output.logits[0, -1].argmax())  # waits for the device

    def _generate(self, ids):
        mask = torch.ones_like(ids)
        tokens = self.model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False,
                                     pad_token_id=0)  # fmt: skip
        return int(tokens[0, -1])

    def _strict(self, chosen):
        """(warm-up times, [(method, seconds)] in the order of the runs)."""
        ids, most = self.inputs[0], warmups(self.args, self.job.length)
        warm = {}
        for method in chosen:
            call = lambda m=method: timing.warm_up(lambda: self._run(m, ids), most)  # noqa: E731
            warm[method.label] = self._try(method, call)
        log, before = [], timing.clock_mhz(self.device)
        for turn in timing.rotations(chosen, samples(self.args, self.job.length)):
            for method in turn:
                seconds = self._try(method, lambda m=method: self._run(m, ids))
                if seconds is not None:
                    log.append((method, seconds))
        after = timing.clock_mhz(self.device)
        self.clocks = {method.label: (before, after) for method in chosen}
        return warm, log

    def _paper(self, chosen):
        """The same by the paper's protocol: method after method, document after document."""
        warm, log = {}, []
        generator = torch.Generator().manual_seed(self.session.seed)
        size = self.model.config.get_text_config().vocab_size
        for method in chosen:
            warm[method.label] = []
            for _ in range(warmups(self.args, self.job.length)):
                random = torch.randint(size, (1, self.job.length), generator=generator)
                random = random.to(self.device)
                seconds = self._try(method, lambda m=method, r=random: self._run(m, r, True))
                warm[method.label].append(seconds)
            before = timing.clock_mhz(self.device)
            for i in range(samples(self.args, self.job.length)):
                ids = self.inputs[i % len(self.inputs)]
                seconds = self._try(method, lambda m=method, x=ids: self._run(m, x, True))
                if seconds is not None:
                    log.append((method, seconds))
            self.clocks[method.label] = (before, timing.clock_mhz(self.device))
        return warm, log

    def _times(self, method, chosen, warm, log):
        """Record fields of the timed runs; order: place of each sample among those of all."""
        mine = [(place, seconds) for place, (m, seconds) in enumerate(log) if m is method]
        kept = [seconds for _, seconds in mine]
        cache = self.records[method.label]["cache_gb"] * 1e9
        return {
            "protocol": self.args.protocol,
            "samples": kept,
            "order": [place for place, _ in mine],
            "with": [m.label for m in chosen],
            "warmups": warm[method.label],
            **timing.statistics_of(kept),
            **self.memory[method.label].fields(cache),
            "clock_mhz": list(self.clocks[method.label]),
            # Cores change their clocks all the time; only a GPU's says something about a run.
            "clock_fell": self.device.type == "cuda" and timing.fell(*self.clocks[method.label]),
            "tiled": self.job.payload["tiled"],
            "beyond_window": self.job.payload["beyond"],
            "ranks": self.ranks.size,
        }
