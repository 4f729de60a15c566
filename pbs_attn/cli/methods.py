# SPDX-License-Identifier: Apache-2.0
"""Methods by name: `pbs`, `full`, `pbs:tau=0.8,segment_size=512`, ..."""

from dataclasses import dataclass, fields

from ..config import PBSConfig
from . import CommandError

# name: (what it is, PBSConfig fields). None: no kernel of ours; "dense": our exact dense route.
METHODS = {
    "sdpa": ("the model's stock attention", None),
    "full": ("exact dense attention by our kernels", "dense"),
    "pbs": ("permuted keys, mean-pooled selection (the paper)", {}),
    "pbs+": ("permuted keys, antidiagonal selection", {"select": "antidiagonal"}),
    "identity": ("the rule of pbs on unpermuted keys: the control", {"permute": "identity"}),
    "meanpool": ("mean-pooled selection in natural order", {"permute": "none"}),
    "xattention": (
        "antidiagonal selection in natural order",
        {"permute": "none", "select": "antidiagonal"},
    ),
}
DENSE_MIN_KV = 2**31 - 1  # no call is that long: every one takes the dense route


@dataclass(frozen=True)
class Method:
    label: str  # as the user wrote it
    kind: str  # stock | dense | sparse
    config: PBSConfig | None


def split(text):
    """Names in a comma-separated list whose parameters are comma-separated too.

    `full,pbs:tau=0.8,segment_size=512` -> ["full", "pbs:tau=0.8,segment_size=512"]
    """
    names = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in piece and ":" not in piece and names and ":" in names[-1]:
            names[-1] += "," + piece
        else:
            names.append(piece)
    return names


def _value(field, text):
    """`text` as the type of a PBSConfig field."""
    if field.type in (bool, "bool"):
        if text.lower() in ("1", "true", "yes"):
            return True
        if text.lower() in ("0", "false", "no"):
            return False
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def config_from(pairs, base=None):
    """A PBSConfig from `base` and ["tau=0.8", ...]."""
    known = {field.name: field for field in fields(PBSConfig)}
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise CommandError(f"got {pair!r}; allowed: NAME=VALUE with one of {', '.join(known)}")
        changes[name] = _value(known[name], text)
    try:
        return (base or PBSConfig()).replace(**changes)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def parse(text, base=None):
    """The methods in `text`; `base` holds what every sparse one starts from."""
    found = []
    for label in split(text):
        name, _, parameters = label.partition(":")
        if name not in METHODS:
            raise CommandError(f"method is {name!r}; allowed: {', '.join(METHODS)}")
        _, changes = METHODS[name]
        pairs = [pair for pair in parameters.split(",") if pair]
        if not isinstance(changes, dict):
            if pairs:
                raise CommandError(f"method {name!r} has no parameters; got {parameters!r}")
            kind = "stock" if changes is None else "dense"
            config = None if changes is None else PBSConfig(min_q=0, min_kv=DENSE_MIN_KV)
            found.append(Method(label, kind, config))
            continue
        config = config_from(pairs, (base or PBSConfig()).replace(**changes))
        found.append(Method(label, "sparse", config))
    if not found:
        raise CommandError(f"no method in {text!r}; allowed: {', '.join(METHODS)}")
    return found


def add_config_arguments(parser):
    """--config, --tau, --block-size, --segment-size: the base of every sparse method."""
    group = parser.add_argument_group("configuration of the sparse methods")
    group.add_argument("--config", metavar="FILE|JSON", help="a PBSConfig as JSON")
    group.add_argument("--tau", type=float, help="threshold (default 0.9)")
    group.add_argument("--block-size", type=int, help="64, 128 (default) or 256")
    group.add_argument("--segment-size", type=int, help="multiple of the block size (256)")
    group.add_argument("--min-q", type=int, help="fewer rows go dense (measured default)")
    group.add_argument("--min-kv", type=int, help="fewer keys go dense (measured default)")
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="any other PBSConfig field, e.g. --set permute=both")  # fmt: skip


def base_config(args):
    """The PBSConfig of the arguments above; None when none was given."""
    flags = ("tau", "block_size", "segment_size", "min_q", "min_kv")
    pairs = [f"{name}={getattr(args, name)}" for name in flags if getattr(args, name) is not None]
    pairs += args.set
    if args.config is None and not pairs:
        return None
    base = None
    if args.config is not None:
        try:
            base = PBSConfig.from_json(args.config)
        except (TypeError, ValueError, OSError) as error:
            raise CommandError(f"--config: {error}") from error
    return config_from(pairs, base)
