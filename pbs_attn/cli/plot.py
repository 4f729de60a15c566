# SPDX-License-Identifier: Apache-2.0
"""plot: where the attention of one head goes, before and after the permutation, block by block."""

import torch

from . import CommandError, mass, measure, methods, models

EXAMPLES = """\
examples:
  python -m pbs_attn plot --layer 5 --head 3 --length 4k --out head.png
  python -m pbs_attn plot --model DIR --text book.txt --layer 12 --head 0 --out head.svg

Left: keys in natural order, the rule of PBS (the `identity` control). Right: keys permuted inside
segments. Same threshold, same rule: what differs is the permutation."""


def add_arguments(parser):
    parser.epilog = EXAMPLES
    models.add_model_arguments(parser)
    parser.add_argument("--length", default="4k", help="tokens, e.g. 4000 or 4k (default)")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.svg|.png|.pdf")
    methods.add_config_arguments(parser)


def head_map(q, k, config):
    """What a picture of one head needs: q [1, 1, N, D], k [1, 1, N, D] -> dict."""
    from .. import pbs_attention

    config = config.replace(min_q=0, min_kv=0, strict=True)
    _, plan = pbs_attention(q, k, k, config=config, return_plan=True)
    natural = mass.key_mass(q[0], k[0], config.block_size)
    own = mass.own_blocks(natural.size(1), config.block_size, config.segment_size)
    history, k_perm = plan.mask(own=False)[0], plan.k_perm[0]
    # The own span is read in natural order, history in permuted order.
    in_own_span = torch.arange(len(own)) >= own.int().argmax(1, keepdim=True)
    blocks = torch.where(
        in_own_span,
        mass.block_mass(natural, None, config.block_size),
        mass.block_mass(natural, k_perm, config.block_size),
    )
    kept = mass.kept_mass(natural, k_perm, history, own, config.block_size)
    computed = history[0] | own
    return {
        "blocks": blocks[0],
        "computed": computed,
        "causal": mass.causal_blocks(len(own)),
        "kept": float(kept.mean()),
    }


def draw(maps, titles, path, heading):
    """One panel per map: attention per block, coloured where computed, grey where skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    matplotlib.rcParams["svg.hashsalt"] = "pbs_attn"  # the same picture, the same file
    norm = LogNorm(1e-4, 0.3)
    colours = matplotlib.colormaps["viridis"]
    greys = LinearSegmentedColormap.from_list("skipped", ["#f7f7f7", "#9a9a9a"])
    figure, axes = pyplot.subplots(
        1, len(maps), figsize=(5.2 * len(maps), 5.4), layout="constrained"
    )
    for axis, found, title in zip(axes, maps, titles, strict=True):
        computed, causal = found["computed"], found["causal"]
        size = len(computed)
        values = norm(found["blocks"].clamp(min=1e-5).numpy())
        cells = greys(values)
        cells[computed.numpy()] = colours(values)[computed.numpy()]
        cells[~causal.numpy()] = 1.0
        axis.imshow(cells, extent=(0, size, size, 0), interpolation="none")
        axis.add_collection(LineCollection(_outline(computed), colors="black", linewidths=0.6))
        axis.set_title(f"{title}\n{_count(found)} computed\n{found['kept']:.1%} of attention kept")
        axis.set_xlabel("key block")
        for direction in (axis.set_xticks, axis.set_yticks):
            direction(range(0, size + 1, max(size // 8, 1)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("query block")
    bars = (
        (greys, "skipped"),
        (colours, "share of the query block's attention: computed"),
    )
    for colormap, label in bars:
        scale = matplotlib.cm.ScalarMappable(norm, colormap)
        bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=40)
        bar.set_label(label)
    figure.suptitle(heading, fontsize=11)
    metadata = {"Date": None} if str(path).endswith(".svg") else None
    figure.savefig(path, dpi=130, metadata=metadata)
    pyplot.close(figure)


def _count(found):
    count, causal = int(found["computed"].sum()), int(found["causal"].sum())
    return f"{count} of {causal} blocks ({count / causal:.0%})"


def _outline(chosen):
    """Line segments around the chosen cells: edges between a chosen and an unchosen one."""
    padded = torch.nn.functional.pad(chosen.int(), (1, 1, 1, 1))
    lines = []
    for row, col in (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist():
        lines.append([(col, row), (col + 1, row)])
    for row, col in (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist():
        lines.append([(col, row), (col, row + 1)])
    return lines


def main(args):
    config = methods.base_config(args) or methods.PBSConfig()
    if config.permute != "keys":
        raise CommandError(f"permute is {config.permute!r}; plot draws the permutation of keys")
    length = models.parse_length(args.length)
    if args.threads:
        torch.set_num_threads(args.threads)
    name, text = models.read_text(args.text)
    model, tokenizer = models.load(
        args.model, dtype=args.dtype, device=args.device,
        trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle,
    )  # fmt: skip
    ids = models.token_ids(tokenizer, text, length).to(args.device)
    taken, _ = measure.capture(model, ids, {args.layer})
    if args.layer not in taken:
        layers = model.config.get_text_config().num_hidden_layers
        raise CommandError(f"--layer is {args.layer}; allowed: 0 .. {layers - 1}")
    q, k, _ = (x.float().cpu() for x in taken[args.layer])
    if not 0 <= args.head < q.size(1):
        raise CommandError(f"--head is {args.head}; allowed: 0 .. {q.size(1) - 1}")
    group = q.size(1) // k.size(1)
    head = slice(args.head, args.head + 1), slice(args.head // group, args.head // group + 1)
    q, k = q[:, head[0]], k[:, head[1]]
    maps = [head_map(q, k, config.replace(permute=order)) for order in ("identity", "keys")]
    titles = ["keys in natural order", f"keys permuted in segments of {config.segment_size}"]
    label = "SmolLM2-135M" if args.model == models.SMOLLM2 else args.model
    heading = (
        f"{label}, layer {args.layer}, head {args.head}, {ids.shape[1]:,} tokens of {name}, "
        f"tau = {config.tau:g}"
    )
    draw(maps, titles, args.out, heading)
    for title, found in zip(titles, maps, strict=True):
        print(f"{title}: {_count(found)} computed, {found['kept']:.1%} of attention kept")
    return 0
