"""The Triton kernels of lightning attention: one walk over a document's chunks serves the output and all three gradients.

A walk goes over tokens p = 0, 1, ... in its own direction, with a decay L = exp(-s) a step, and computes

    out_p = sum_{j <= p} L^(p - j) (a_p . b_j) c_j + (what the state at its beginning adds).

    role    a   b   c   direction       state X [rows of c, rows of b]
    o       q   k   v   forward         S    = sum v k^T
    dq      do  v   k   forward         S^T
    dk      v   do  q   backward        dS^T, where dS = sum do q^T
    dv      k   q   do  backward        dS

Nothing is stored between chunks: X stays in registers as the accumulator of a product, values first, so that it is also
the left operand of the next read-out. Each of the tensors is read once per role. A document whose length is no multiple of
the chunk has its short chunk first, filled up with rows of zeros in front; after it every decay is the same in every chunk,
and none has a positive exponent. The backward walks start from a state that is one step older (dS at the end is the gradient
of a state after the last token), hence `lag`: 1 forward, 0 backward.

Source: MiniMax-01 paper section 2.2.1 and algorithm 1; chunked linear attention with constant decay.
"""
# mypy: allow-untyped-defs
# No `from __future__ import annotations`: Triton reads the annotations of arguments.

import triton
import triton.language as tl


@triton.jit
def _locate(
    item, cu_seqlens, documents, length, chunks_per_part,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Document, first token, tokens, part of the document and item of its first part, for one item of work.

    Without SPLIT an item is a document. With it, a document is cut into parts of `chunks_per_part` chunks; items past the last
    part get document = `documents` and no tokens.
    """
    part = item * 0
    first_item = item
    document = item
    if PACKED:
        if SPLIT:
            n = tl.arange(0, WIDTH)
            known = n < documents
            before = tl.load(cu_seqlens + n, mask=known, other=0).to(tl.int32)
            after = tl.load(cu_seqlens + n + 1, mask=known, other=0).to(tl.int32)
            chunks = (after - before + CHUNK - 1) // CHUNK
            parts = tl.where(known, tl.maximum((chunks + chunks_per_part - 1) // chunks_per_part, 1), 0)
            ends = tl.cumsum(parts, 0)
            document = tl.sum(tl.where(known & (ends <= item), 1, 0), 0)
            first_item = tl.sum(tl.where(n < document, parts, 0), 0)
            part = item - first_item
        real = document < documents
        start = tl.load(cu_seqlens + document, mask=real, other=0).to(tl.int32)
        tokens = tl.load(cu_seqlens + document + 1, mask=real, other=0).to(tl.int32) - start
    else:
        if SPLIT:
            parts = tl.maximum(((length + CHUNK - 1) // CHUNK + chunks_per_part - 1) // chunks_per_part, 1)
            document = item // parts
            part = item % parts
            first_item = document * parts
        start = document * length
        tokens = length
    return document, start, tokens, part, first_item


@triton.jit
def _at(base, line, stride):
    """Addresses of tokens `line` [C] of a [T, ..] tensor.

    Made anew in every chunk: addresses that are kept or stepped take registers, which is what limits these kernels.
    """
    return base + line.to(tl.int64) * stride


@triton.jit
def _pick(role, first, second, third):
    """A select, through which Triton sees alignment; it does not see it through nested branches."""
    return tl.where(role == 0, first, tl.where(role == 1, second, third))


# Not specialised: one compiled kernel serves every length and number of documents.
@triton.jit(do_not_specialize=["heads", "documents", "length", "chunks_per_part", "items"])
def walk_kernel(
    q, k, v, do, out, dq, dk, dv, slopes, cu_seqlens, slots, initial, final_grad, parts, final,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, out_t, out_h, dq_t, dq_h, dk_t, dk_h, dv_t, dv_h,
    heads, documents, length, chunks_per_part, items,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    BOUND: tl.constexpr, FINAL: tl.constexpr, SLOTS: tl.constexpr, LATE: tl.constexpr,
    SCORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one item (document or part), one head, BLOCK columns of the output, one role.

    Args:
        q, k, v, do, out, dq, dk, dv: [T, H, D] with strides _t, _h and 1.
        slopes: fp32 [H], at least 0.
        cu_seqlens: [documents + 1] where PACKED; else every document has `length` tokens.
        slots: place of each document's state in `initial` and `final`, -1 for none, where SLOTS; else its number.
        initial, final: fp32 [.., H, D, D]; `final` is the gradient of `initial` in a BACKWARD launch.
        final_grad: gradient of the final state, BACKWARD only.
        parts: fp32 [sides, items, H, D, D] from `part_kernel`, where SPLIT.
        BOUND: documents begin with `initial` (and `final_grad`), not with zeros. FINAL: write `final`.
        LATE: make the decays of the read-out in every chunk, for fewer registers.
        SCORE, OPERAND: types of the operands of a . b, and of the other products.
    """
    HALVES: tl.constexpr = D // BLOCK
    pid = tl.program_id(0)
    column = tl.arange(0, D)
    block = tl.arange(0, BLOCK)
    if BACKWARD:
        # The role is innermost: the three walks over one head's tokens run side by side and share what they read in L2.
        role = pid % 3
        rest = pid // 3
        a, a_t, a_h = _pick(role, do, v, k), _pick(role, do_t, v_t, k_t), _pick(role, do_h, v_h, k_h)
        b, b_t, b_h = _pick(role, v, do, q), _pick(role, v_t, do_t, q_t), _pick(role, v_h, do_h, q_h)
        c, c_t, c_h = _pick(role, k, q, do), _pick(role, k_t, q_t, do_t), _pick(role, k_h, q_h, do_h)
        to, to_t, to_h = _pick(role, dq, dk, dv), _pick(role, dq_t, dk_t, dv_t), _pick(role, dq_h, dk_h, dv_h)
        lag = tl.where(role == 0, 1, 0)
        step = tl.where(role == 0, 1, -1)
        # dq and dk hold their states transposed: rows of k, columns of v.
        row_stride = tl.where(role == 2, D, 1)
        column_stride = tl.where(role == 2, 1, D)
    else:
        role = 2
        rest = pid
        a, a_t, a_h = q, q_t, q_h
        b, b_t, b_h = k, k_t, k_h
        c, c_t, c_h = v, v_t, v_h
        to, to_t, to_h = out, out_t, out_h
        lag = 1
        step = 1
        row_stride = D
        column_stride = 1
    half = rest % HALVES
    rest = rest // HALVES
    head = (rest % heads).to(tl.int64)  # times a stride it can pass 2^31
    item = rest // heads
    document, start, tokens, part, first_item = _locate(
        item, cu_seqlens, documents, length, chunks_per_part, CHUNK, PACKED, SPLIT, WIDTH
    )
    chunks = (tokens + CHUNK - 1) // CHUNK
    pad = chunks * CHUNK - tokens
    first = 0
    last = chunks
    if SPLIT:
        first = part * chunks_per_part
        last = tl.minimum(first + chunks_per_part, chunks)
    origin = start
    if BACKWARD:
        origin = tl.where(role == 0, start, start + tokens - 1)

    rate = tl.load(slopes + head) * 1.4426950408889634
    tile = (half * BLOCK + block)[:, None] * row_stride + column[None, :] * column_stride
    place = document.to(tl.int64)
    stateful = document < documents
    if SLOTS:
        place = tl.load(slots + document, mask=stateful, other=-1).to(tl.int64)
        stateful = place >= 0
    state = tl.zeros((BLOCK, D), tl.float32)
    if SPLIT:
        side = parts
        if BACKWARD:
            side = parts + tl.where(role == 0, 0, 1).to(tl.int64) * items * heads * (D * D)
        part_rows = chunks_per_part * CHUNK
        whole = tl.exp2(-rate * part_rows.to(tl.float32))
        for earlier in range(0, part):
            at = ((first_item + earlier) * heads + head) * (D * D)
            state = state * whole + tl.load(side + at + tile)
    if BOUND:
        source = initial
        if BACKWARD:
            if role != 0:
                source = final_grad
        begins = stateful & (part == 0) & (block[:, None] >= 0)
        state += tl.load(source + (place * heads + head) * (D * D) + tile, mask=begins, other=0.0)

    row = tl.arange(0, CHUNK)
    gap = row[None, :] - row[:, None]
    mask = tl.where(gap >= 0, tl.exp2(-rate * tl.maximum(gap, 0).to(tl.float32)), 0.0)
    age = tl.exp2(-rate * (CHUNK - lag - row).to(tl.float32))
    reading = tl.exp2(-rate * (row + lag).to(tl.float32))
    kept = tl.exp2(-rate * CHUNK)
    turned = row * step
    a += head * a_h
    b += head * b_h
    c += head * c_h + half * BLOCK
    to += head * to_h + half * BLOCK
    for chunk in tl.range(first, last, num_stages=STAGES):
        offset = chunk * CHUNK - pad
        inside = row + offset >= 0
        line = origin + step * offset + turned
        xa = tl.load(_at(a, line, a_t)[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        xb = tl.load(_at(b, line, b_t)[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        xc = tl.load(_at(c, line, c_t)[:, None] + block[None, :], mask=inside[:, None], other=0.0)
        aged = (xc.to(tl.float32) * age[:, None]).to(OPERAND)
        # Only a state that was there before the first chunk can tell the zeros in front of a short chunk from tokens.
        ahead = tl.where(chunk == 0, pad, 0)
        if BOUND or LATE:
            read_decay = tl.exp2(-rate * tl.maximum(row + lag - ahead, 0).to(tl.float32))
            keep_decay = tl.exp2(-rate * (CHUNK - ahead).to(tl.float32))
        else:
            read_decay = reading
            keep_decay = kept
        # In this order, scores last, the fewest registers are alive at once.
        result = tl.dot(state.to(OPERAND), tl.trans(xa).to(OPERAND), input_precision=PRECISION) * read_decay[None, :]
        scores = tl.dot(xb.to(SCORE), tl.trans(xa).to(SCORE), input_precision=PRECISION) * mask
        result = tl.dot(tl.trans(xc).to(OPERAND), scores.to(OPERAND), result, input_precision=PRECISION)
        state = tl.dot(tl.trans(aged), xb.to(OPERAND), state * keep_decay, input_precision=PRECISION)
        target = _at(to, line, to_t)[None, :] + block[:, None]
        tl.store(target, result.to(to.dtype.element_ty), mask=inside[None, :] & (block[:, None] >= 0))

    if FINAL:
        ends = stateful & (last == chunks) & (block[:, None] >= 0)
        if BACKWARD:
            ends = ends & (role == 2)
        tl.store(final + (place * heads + head) * (D * D) + tile, state, mask=ends)


@triton.jit(do_not_specialize=["heads", "documents", "length", "chunks_per_part", "items"])
def part_kernel(
    q, k, v, do, slopes, cu_seqlens, slots, initial, final_grad, parts,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    heads, documents, length, chunks_per_part, items,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that every part of a document adds by itself (its first part with the initial state), for SPLIT walks.

    Writes parts [sides, items, H, D, D], side 0 from k and v forward, side 1 (BACKWARD only) from q and do backward. The last
    part of a document is read by nobody and left unwritten. Arguments as in `walk_kernel`.
    """
    HALVES: tl.constexpr = D // BLOCK
    pid = tl.program_id(0)
    row = tl.arange(0, CHUNK)
    column = tl.arange(0, D)
    block = tl.arange(0, BLOCK)
    side = 0
    rest = pid
    b = k
    c = v
    b_t = k_t
    b_h = k_h
    c_t = v_t
    c_h = v_h
    lag = 1
    step = 1
    if BACKWARD:
        side = pid % 2
        rest = pid // 2
        if side == 1:
            b = q
            c = do
            b_t = q_t
            b_h = q_h
            c_t = do_t
            c_h = do_h
        lag = tl.where(side == 0, 1, 0)
        step = tl.where(side == 0, 1, -1)
    half = rest % HALVES
    rest = rest // HALVES
    head = (rest % heads).to(tl.int64)  # times a stride it can pass 2^31
    item = rest // heads
    document, start, tokens, part, first_item = _locate(
        item, cu_seqlens, documents, length, chunks_per_part, CHUNK, PACKED, True, WIDTH
    )
    chunks = (tokens + CHUNK - 1) // CHUNK
    pad = chunks * CHUNK - tokens
    first = part * chunks_per_part
    last = first + chunks_per_part
    needed = last < chunks
    last = tl.where(needed, last, first)
    origin = start
    if BACKWARD:
        origin = tl.where(side == 0, start, start + tokens - 1)

    rate = tl.load(slopes + head) * 1.4426950408889634
    age = tl.exp2(-rate * (CHUNK - lag - row).to(tl.float32))
    kept = tl.exp2(-rate * CHUNK)
    tile = (half * BLOCK + block)[:, None] * D + column[None, :]
    state = tl.zeros((BLOCK, D), tl.float32)
    if BOUND:
        place = document.to(tl.int64)
        stateful = document < documents
        if SLOTS:
            place = tl.load(slots + document, mask=stateful, other=-1).to(tl.int64)
            stateful = place >= 0
        source = initial
        if BACKWARD:
            if side == 1:
                source = final_grad
        begins = stateful & needed & (part == 0) & (block[:, None] >= 0)
        state += tl.load(source + (place * heads + head) * (D * D) + tile, mask=begins, other=0.0)

    b += head * b_h
    c += head * c_h + half * BLOCK
    turned = row * step
    for chunk in tl.range(first, last, num_stages=STAGES):
        offset = chunk * CHUNK - pad
        inside = row + offset >= 0
        line = origin + step * offset + turned
        xb = tl.load(_at(b, line, b_t)[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        xc = tl.load(_at(c, line, c_t)[:, None] + block[None, :], mask=inside[:, None], other=0.0)
        if BOUND:
            ahead = tl.where(chunk == 0, pad, 0)
            keep_decay = tl.exp2(-rate * (CHUNK - ahead).to(tl.float32))
        else:
            keep_decay = kept
        aged = (xc.to(tl.float32) * age[:, None]).to(OPERAND)
        state = tl.dot(tl.trans(aged), xb.to(OPERAND), state * keep_decay, input_precision=PRECISION)
    at = ((side * items + item) * heads + head) * (D * D)
    tl.store(parts + at + tile, state, mask=needed & (block[:, None] >= 0))


@triton.jit
def store_states_kernel(states, slots, pool, size, BLOCK: tl.constexpr):
    """pool[slots[n]] = states[n], fp32 [.., size], for every n whose slot is not -1; program (n, piece of BLOCK numbers)."""
    document = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + document).to(tl.int64)
    value = tl.load(states + document.to(tl.int64) * size + offset, mask=offset < size, other=0.0)
    tl.store(pool + slot * size + offset, value, mask=(offset < size) & (slot >= 0))
