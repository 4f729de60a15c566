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
    blocks = torch.where(
        own,
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
    """One panel per map: attention per block, the computed blocks framed, the others veiled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    matplotlib.rcParams["svg.hashsalt"] = "pbs_attn"  # the same picture, the same file
    figure, axes = pyplot.subplots(1, len(maps), figsize=(5.4 * len(maps), 5.6))
    colours = matplotlib.colormaps["viridis"].copy()
    colours.set_bad("white")
    for axis, found, title in zip(axes, maps, titles, strict=True):
        size = len(found["computed"])
        values = found["blocks"].clamp(min=1e-5).masked_fill(~found["causal"], float("nan"))
        image = axis.imshow(
            values, cmap=colours, norm=LogNorm(1e-4, 0.3), extent=(0, size, size, 0)
        )
        veil = torch.full((size, size, 4), 1.0)
        veil[..., 3] = 0.78 * (found["causal"] & ~found["computed"])
        axis.imshow(veil, extent=(0, size, size, 0))
        axis.add_collection(
            LineCollection(_outline(found["computed"]), colors="black", linewidths=0.7)
        )
        count, causal = int(found["computed"].sum()), int(found["causal"].sum())
        axis.set_title(
            f"{title}\n{count} of {causal} blocks computed ({count / causal:.0%}), "
            f"{found['kept']:.1%} of the attention kept",
            fontsize=10,
        )
        axis.set_xlabel("key block")
        axis.set_xticks(range(0, size + 1, max(size // 8, 1)))
        axis.set_yticks(range(0, size + 1, max(size // 8, 1)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("query block")
    bar = figure.colorbar(image, ax=axes, fraction=0.022, pad=0.02)
    bar.set_label("share of the query block's attention")
    figure.suptitle(heading, fontsize=11)
    metadata = {"Date": None} if str(path).endswith(".svg") else None
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata=metadata)
    pyplot.close(figure)


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
        count, causal = int(found["computed"].sum()), int(found["causal"].sum())
        print(f"{title}: {count} of {causal} blocks ({count / causal:.1%}), "
              f"{found['kept']:.2%} of the attention")  # fmt: skip
    return 0
