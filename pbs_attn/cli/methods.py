# SPDX-License-Identifier: Apache-2.0
"""What commands share about methods: the list for their help, parsing, and the base configuration.

The methods themselves are in pbs_attn/methods; here their errors become the command line's.
"""

from dataclasses import fields

from .. import methods as registry
from ..config import PBSConfig
from ..methods.kernels import KernelMethod
from . import CommandError


def listing():
    """A line per method, for --help."""
    return "\n".join(f"  {name:<12} {registry.find(name).ABOUT}" for name in registry.METHODS)


def parse(text, base=None):
    """The methods in `text`; `base` holds what every one starts from, see `pbs_attn.methods`."""
    try:
        return registry.parse(text, base)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def policy(text, base=None):
    """The one method of `--method`, to be registered: not the model's own attention."""
    found = parse(text, base)
    if len(found) != 1:
        raise CommandError(f"--method is {text!r}, which names {len(found)}; allowed: one")
    try:
        return registry.policy("--method", found[0])
    except ValueError as error:
        raise CommandError(str(error)) from error


def config_from(pairs, base=None):
    """A PBSConfig from `base` and ["tau=0.8", ...]."""
    known = [field.name for field in fields(PBSConfig)]
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = registry.ALIASES.get(name, name)
        if not equals or name not in known:
            raise CommandError(f"got {pair!r}; allowed: NAME=VALUE with one of {', '.join(known)}")
        changes[name] = KernelMethod.value(name, text)
    try:
        return (base or PBSConfig()).replace(**changes)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


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
