# SPDX-License-Identifier: Apache-2.0
"""A model under a method: the one way in which commands and benchmarks switch attention."""

import contextlib

from .. import methods


@contextlib.contextmanager
def using(model, method):
    """The model with the attention of `method` inside the block, and back afterwards.

    model: of transformers. method: a Method or its text. Yields the `pbs_attn.Record` of the
    attention calls, whose numbers are ready when the block ends, or None for the model's own
    attention ("sdpa"), which nothing counts. Raises what `patch_model` and `methods.get` raise.
    """
    method = methods.get(method) if isinstance(method, str) else method
    if method.kind == "stock":
        yield None
        return
    from .. import patch_model, record

    with patch_model(model, method), record() as calls:
        yield calls
