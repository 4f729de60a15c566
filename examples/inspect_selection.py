# SPDX-License-Identifier: Apache-2.0
"""What is computed: density of every head of a layer, and the block map of one.

python examples/inspect_selection.py [LAYER [HEAD [TOKENS]]]
"""

import sys

import pbs_attn
from pbs_attn.cli import measure, models

given, default = [int(x) for x in sys.argv[1:]], [5, 0, 2048]
layer, head, length = given + default[len(given) :]
model, tokenizer = models.load("smollm2")
ids = models.token_ids(tokenizer, models.demo_text()[1], length)
taken, _ = measure.capture(model, ids, {layer})  # q, k, v as attention sees them
q, k, v = taken[layer]

for permute in ("identity", "keys"):
    config = pbs_attn.PBSConfig(permute=permute, min_q=0, min_kv=0)
    _, plan = pbs_attn.pbs_attention(q, k, v, config=config, return_plan=True)
    print(f"\npermute={permute!r}, tau={config.tau}: layer {layer}, density per head")
    print("  ".join(f"{h}: {x:.0%}" for h, x in enumerate(plan.density()[0].tolist())))
    print(f"head {head}, rows = query blocks; # own segment, o selected, . skipped")
    everything, selected = plan.mask()[0, head], plan.mask(own=False)[0, head]
    for m, row in enumerate(everything.tolist()):
        marks = ["o" if selected[m, n] else "#" if read else "." for n, read in enumerate(row)]
        print("  " + " ".join(marks[: m + 1]))
