# SPDX-License-Identifier: Apache-2.0
"""A Llama (SmolLM2-135M) whose prefill is sparse: only `attn_implementation` differs from dense.

python examples/llama_prefill.py [TOKENS]
"""

import sys

import pbs_attn
from pbs_attn.cli import models

length = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
model, tokenizer = models.load("smollm2")  # any AutoModelForCausalLM.from_pretrained(...)
ids = models.token_ids(tokenizer, models.demo_text()[1], length)

pbs_attn.register()  # from here on transformers knows the name
model.set_attn_implementation("pbs_attn")  # or from_pretrained(..., attn_implementation=...)

with pbs_attn.record() as calls:
    tokens = model.generate(ids, max_new_tokens=10, do_sample=False)

print(tokenizer.decode(tokens[0, ids.shape[1] :]))
print(calls.summary())
