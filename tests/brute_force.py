# SPDX-License-Identifier: Apache-2.0
"""The definition once more, token by token in plain loops: what the reference is checked with.

Nothing here comes from pbs_attn. Slow on purpose; for sequences of some dozens of tokens.
"""

import math

import torch


def first_own_key(row_of_block, offset, own, block_k, segment, visible):
    """Where the own span begins, for the block whose first row is row_of_block."""
    position = max(offset + row_of_block, 0)
    if own in ("segment", "none"):
        return (position // segment) * segment
    if own == "block":
        return (position // block_k) * block_k
    return visible if own == "mask" else 0


def token_mask(bits, seqlen_q, seqlen_k, k_perm, q_perm, own, block_q, block_k, segment):
    """bool [Nq, Nk] in the caller's order of rows and tokens, for one head (bits [Tq, Tk])."""
    offset = seqlen_k - seqlen_q
    place_of = {int(token): j for j, token in enumerate(k_perm)}
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for permuted_row in range(seqlen_q):
        row = int(q_perm[permuted_row]) if q_perm is not None else permuted_row
        m = permuted_row // block_q
        first = m * block_q
        if q_perm is not None:
            first = first // segment * segment
        last = min((m + 1) * block_q, seqlen_q) - 1
        start = first_own_key(first, offset, own, block_k, segment, max(offset + last + 1, 0))
        for token in range(seqlen_k):
            j = place_of[token]
            causal = token <= offset + row
            if own == "all":
                mask[row, token] = causal
            elif own == "mask":
                mask[row, token] = bool(bits[m, j // block_k]) and causal
            elif j < start:
                mask[row, token] = bool(bits[m, j // block_k])
            else:
                mask[row, token] = causal and own != "none"
    return mask


def dense_attention(q, k, v, mask, scale):
    """One head: (out [Nq, D], lse [Nq]) over the tokens that mask keeps."""
    out, lse = torch.zeros_like(q), torch.full((q.size(0),), -math.inf, dtype=q.dtype)
    for i in range(q.size(0)):
        kept = mask[i].nonzero().flatten().tolist()
        if not kept:
            continue
        logits = [scale * float(q[i] @ k[j]) for j in kept]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        total = sum(weights)
        lse[i] = top + math.log(total)
        for w, j in zip(weights, kept, strict=True):
            out[i] += w / total * v[j]
    return out, lse


def add_means(q, k, v, mask, stands_for, scale):
    """As dense_attention, and row i also sees a mean token for every block (a list of tokens) of
    stands_for[i]: mean key, mean value, a logit that is ln of the number of tokens higher."""
    out, lse = torch.zeros_like(q), torch.full((q.size(0),), -math.inf, dtype=q.dtype)
    for i in range(q.size(0)):
        seen = [(scale * float(q[i] @ k[j]), v[j]) for j in mask[i].nonzero().flatten().tolist()]
        for tokens in stands_for[i]:
            logit = scale * float(q[i] @ block_mean(k, tokens)) + math.log(len(tokens))
            seen.append((logit, block_mean(v, tokens)))
        if not seen:
            continue
        top = max(logit for logit, _ in seen)
        total = sum(math.exp(logit - top) for logit, _ in seen)
        lse[i] = top + math.log(total)
        for logit, value in seen:
            out[i] += math.exp(logit - top) / total * value
    return out, lse


def dropped_blocks(bits, seqlen_q, seqlen_k, k_perm, q_perm, own, block_q, block_k, segment):
    """[row] -> lists of tokens: blocks that every row of its query block sees, that its own span
    does not hold and that bits [Tq, Tk] does not list."""
    whole = token_mask(
        torch.ones_like(bits), seqlen_q, seqlen_k, k_perm, q_perm, own, block_q, block_k, segment
    )
    offset, result = seqlen_k - seqlen_q, [[] for _ in range(seqlen_q)]
    for m in range(bits.size(0)):
        places = range(m * block_q, min((m + 1) * block_q, seqlen_q))
        rows = [int(q_perm[r]) if q_perm is not None else r for r in places]
        first = m * block_q if q_perm is None else m * block_q // segment * segment
        start = first_own_key(first, offset, own, block_k, segment, max(offset + first + 1, 0))
        for n in range(bits.size(1)):
            tokens = [int(t) for t in k_perm[n * block_k : (n + 1) * block_k]]
            before = (n + 1) * block_k <= start
            if before and not bits[m, n] and all(whole[r, t] for r in rows for t in tokens):
                for r in rows:
                    result[r].append(tokens)
    return result


def block_mean(x, rows):
    return sum(x[r] for r in rows) / len(rows)


def mean_pool_row(q, k, rows, key_blocks, scale):
    """Masses {n: share} of one query block over key_blocks {n: [tokens]}."""
    centre = block_mean(q, rows)
    logit = {n: scale * float(centre @ block_mean(k, keys)) for n, keys in key_blocks.items()}
    top = max(logit.values())
    total = sum(math.exp(x - top) for x in logit.values())
    return {n: math.exp(x - top) / total for n, x in logit.items()}


def antidiagonal_row(q, k, rows, key_blocks, scale, t, reduce, offset, natural, own=None):
    """As mean_pool_row. rows and tokens are in permuted order; offset: position of row 0.

    own {n: [tokens]}: blocks of the own span, in natural order, that share the softmax."""
    per_group = []
    for a in range(0, len(rows), t):
        group = rows[a : a + t]
        cells = {}
        spans = [(n, keys, natural) for n, keys in key_blocks.items()]
        spans += [(("own", n), keys, True) for n, keys in (own or {}).items()]
        for n, keys, causal in spans:
            for b in range(0, len(keys), t):
                if causal and keys[b] > offset + group[-1]:
                    continue
                z = 0.0
                for i in range(t):
                    r, c = t - 1 - i, b + i
                    if r < len(group) and c < len(keys):
                        z += float(q[group[r]] @ k[keys[c]])
                cells[n, b] = z * scale / t
        top = max(cells.values(), default=0.0)
        total = sum(math.exp(z - top) for z in cells.values())
        mass = {n: 0.0 for n in key_blocks}
        for (n, _), z in cells.items():
            if n in mass:
                mass[n] += math.exp(z - top) / total
        per_group.append(mass)
    if reduce == "max":
        return {n: max(g[n] for g in per_group) for n in key_blocks}
    return {n: sum(g[n] for g in per_group) / len(per_group) for n in key_blocks}


def choose(rule, tau, mass):
    """The set of blocks that the rule keeps from {n: mass}."""
    if rule == "absolute":
        return {n for n, p in mass.items() if p >= tau}
    if rule == "relative":
        return {n for n, p in mass.items() if p >= tau * max(mass.values())}
    order = sorted(mass, key=lambda n: (-mass[n], n))
    if rule == "budget":
        return set(order[: math.ceil(tau)])
    kept, total, whole = set(), 0.0, sum(mass.values())
    for n in order:
        if total >= tau * whole and tau < 1:
            break
        kept.add(n)
        total += mass[n]
    return kept
