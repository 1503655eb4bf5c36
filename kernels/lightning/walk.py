"""The Triton kernels of lightning attention: one walk over a document's chunks serves the output and all three gradients.

A walk goes over tokens p = 0, 1, ... in its own direction, with a decay L = exp(-s) a step, and computes

    out_p = sum_{j <= p} L^(p - j) (a_p . b_j) c_j + (what the state at its beginning adds).

    role    a   b   c   direction       state X [rows of c, rows of b]
    o       q   k   v   forward         S    = sum v k^T
    dq      do  v   k   forward         S^T
    dk      v   do  q   backward        dS^T, where dS = sum do q^T
    dv      k   q   do  backward        dS

Nothing is stored between chunks: X stays in registers as the accumulator of a product, values first, so that it is also
the left operand of the next read-out. Each of the tensors is read once per role. Chunks lie on a grid that begins where the
walk begins, so that every decay is the same in every chunk, and none has a positive exponent. A document whose length is no
multiple of the chunk has its short chunk last, filled up with zeros; only the state after it has to know (FINAL). The
backward walks start from a state that is one step older (dS at the end is the gradient of a state after the last token),
hence `lag`: 1 forward, 0 backward.

a and b come through tensor descriptors, one a document, whose bounds make the zeros of a short chunk; that takes no registers
for addresses, which is what limits these kernels. c and the output go through pointers: a descriptor costs 0.7 us to make,
more than it saves there, and a descriptor cannot store above its first row.

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

    Made anew in every chunk: addresses that are kept or stepped take registers.
    """
    return base + line.to(tl.int64) * stride


@triton.jit
def _rows(base, tokens, stride, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Descriptor of the rows of one document and head, which reads zeros before its first row and after its last one."""
    return tl.make_tensor_descriptor(base, [tl.maximum(tokens, 1), COLUMNS], [stride.to(tl.int64), 1], [CHUNK, COLUMNS])


@triton.jit
def _pick(role, first, second, third):
    """A select, through which Triton sees alignment; it does not see it through nested branches."""
    return tl.where(role == 0, first, tl.where(role == 1, second, third))


@triton.jit
def _state(base, half, turned, wanted, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows half * BLOCK .. of the state [D, D] at `base`, of its transpose where `turned`; zeros where not `wanted`."""
    line = half * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    if turned:  # read along rows and turned here: a load along columns would fetch 32 bytes for 4
        lying = tl.load(base + column[:, None] * D + line[None, :], mask=wanted & (line[None, :] >= 0), other=0.0)
        state = tl.trans(lying)
    else:
        state = tl.load(base + line[:, None] * D + column[None, :], mask=wanted & (line[:, None] >= 0), other=0.0)
    return state


@triton.jit
def _reach(rate, rows):
    """How many stretches of `rows` tokens back a decay of 2^-rate a token is not yet zero in fp32 (2^-150), and one more."""
    return tl.minimum(150.0 / tl.maximum(rate * rows, 1e-30), 1e9).to(tl.int32) + 1


@triton.jit
def _silu_of_one(x):
    y = x.to(tl.float32)
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * y))
    return (y * root * root).to(x.dtype)


@triton.jit
def _silu(x, OPERAND: tl.constexpr):
    """x / (1 + exp(-x)), in fp32, rounded to the type of x.

    Mapped over single numbers: over a whole tile the compiler would hold all of its intermediate results at once, and spill.
    The interpreter, where operands are fp32, cannot map.
    """
    if OPERAND == tl.float32:
        return _silu_of_one(x)
    return tl.map_elementwise(_silu_of_one, x)


@triton.jit
def _step(
    state, rows_a, rows_b, c, to, c_t, to_t, offset, tokens, mask, reading, age, kept,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr, SCORES_FIRST: tl.constexpr,
    SCORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of one chunk, whose first row is token `offset`, and returns the state after it.

    Arguments as made and described in `walk_kernel`.
    """
    block = tl.arange(0, BLOCK)
    lines = tl.arange(0, CHUNK) + offset
    inside = (lines >= 0) & (lines < tokens)
    at_c = _at(c, lines, c_t)[:, None] + block[None, :]
    xa = rows_a.load([offset, 0])
    if SILU:  # which takes registers of its own: a tile is loaded when the one before is done with
        xa = _silu(xa, OPERAND)
    else:
        xb = rows_b.load([offset, 0])
        xc = tl.load(at_c, mask=inside[:, None], other=0.0)
        aged = tl.trans((xc.to(tl.float32) * age[:, None]).to(OPERAND))
    if not SCORES_FIRST:
        result = tl.dot(state.to(OPERAND), tl.trans(xa).to(OPERAND), input_precision=PRECISION) * reading[None, :]
    if SILU:
        xb = _silu(rows_b.load([offset, 0]), OPERAND)
    scores = tl.dot(xb.to(SCORE), tl.trans(xa).to(SCORE), input_precision=PRECISION) * mask
    if SCORES_FIRST:
        result = tl.dot(state.to(OPERAND), tl.trans(xa).to(OPERAND), input_precision=PRECISION) * reading[None, :]
    if SILU:
        xc = _silu(tl.load(at_c, mask=inside[:, None], other=0.0), OPERAND)
        aged = tl.trans((xc.to(tl.float32) * age[:, None]).to(OPERAND))
    result = tl.dot(tl.trans(xc).to(OPERAND), scores.to(OPERAND), result, input_precision=PRECISION)
    state = tl.dot(aged, xb.to(OPERAND), state * kept, input_precision=PRECISION)
    target = _at(to, lines, to_t)[None, :] + block[:, None]
    tl.store(target, result.to(to.dtype.element_ty), mask=inside[None, :] & (block[:, None] >= 0))
    return state


# Not specialised: one compiled kernel serves every length and number of documents.
@triton.jit(do_not_specialize=["heads", "documents", "length", "chunks_per_part", "items"])
def walk_kernel(
    q, k, v, do, out, dq, dk, dv, slopes, cu_seqlens, slots, initial, final_grad, parts, final,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, out_t, out_h, dq_t, dq_h, dk_t, dk_h, dv_t, dv_h,
    heads, documents, length, chunks_per_part, items,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    BOUND: tl.constexpr, FINAL: tl.constexpr, SLOTS: tl.constexpr, SILU: tl.constexpr, SCORES_FIRST: tl.constexpr,
    SCORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one item (document or part), one head, BLOCK columns of the output, one role.

    Args:
        q, k, v, do, out, dq, dk, dv: [T, H, D] with strides _t, _h and 1; strides and addresses of q, k, v and do are
            multiples of 16 bytes.
        slopes: fp32 [H], at least 0.
        cu_seqlens: [documents + 1] where PACKED; else every document has `length` tokens.
        slots: place of each document's state in `initial` and `final`, -1 for none, where SLOTS; else its number.
        initial, final: fp32 [.., H, D, D]; `final` is the gradient of `initial` in a BACKWARD launch.
        final_grad: gradient of the final state, BACKWARD only.
        parts: fp32 [sides, items, H, D, D] from `part_kernel`, where SPLIT.
        BOUND: documents begin with `initial` (and `final_grad`), not with zeros. FINAL: write `final`.
        SILU: q, k and v are SiLU of what is loaded; not BACKWARD.
        SCORES_FIRST: scores before the read-out: the update of the state runs on beside them, for some more registers.
        SCORE, OPERAND: types of the operands of a . b, and of the other products.
    """
    HALVES: tl.constexpr = D // BLOCK
    pid = tl.program_id(0)
    column = tl.arange(0, D)
    block = tl.arange(0, BLOCK)
    row = tl.arange(0, CHUNK)
    if BACKWARD:
        # The role is innermost: the three walks over one head's tokens run side by side and share what they read in L2.
        role = pid % 3
        rest = pid // 3
        a, a_t, a_h = _pick(role, do, v, k), _pick(role, do_t, v_t, k_t), _pick(role, do_h, v_h, k_h)
        b, b_t, b_h = _pick(role, v, do, q), _pick(role, v_t, do_t, q_t), _pick(role, v_h, do_h, q_h)
        c, c_t, c_h = _pick(role, k, q, do), _pick(role, k_t, q_t, do_t), _pick(role, k_h, q_h, do_h)
        to, to_t, to_h = _pick(role, dq, dk, dv), _pick(role, dq_t, dk_t, dv_t), _pick(role, dq_h, dk_h, dv_h)
        forward = role == 0
        lag = tl.where(forward, 1, 0)
    else:
        role = 2
        rest = pid
        a, a_t, a_h = q, q_t, q_h
        b, b_t, b_h = k, k_t, k_h
        c, c_t, c_h = v, v_t, v_h
        to, to_t, to_h = out, out_t, out_h
        lag = 1
    turned = role != 2  # dq and dk hold their states transposed: rows of k, columns of v
    half = rest % HALVES
    rest = rest // HALVES
    head = (rest % heads).to(tl.int64)  # times a stride it can pass 2^31
    item = rest // heads
    document, start, tokens, part, first_item = _locate(
        item, cu_seqlens, documents, length, chunks_per_part, CHUNK, PACKED, SPLIT, WIDTH
    )
    chunks = (tokens + CHUNK - 1) // CHUNK
    first = 0
    last = chunks
    if SPLIT:
        first = part * chunks_per_part
        last = tl.minimum(first + chunks_per_part, chunks)
    begin = start.to(tl.int64)
    rows_a = _rows(a + begin * a_t + head * a_h, tokens, a_t, CHUNK, D)
    rows_b = _rows(b + begin * b_t + head * b_h, tokens, b_t, CHUNK, D)
    c += begin * c_t + head * c_h + half * BLOCK
    to += begin * to_t + head * to_h + half * BLOCK

    rate = tl.load(slopes + head) * 1.4426950408889634
    place = document.to(tl.int64)
    stateful = document < documents
    if SLOTS:
        place = tl.load(slots + document, mask=stateful, other=-1).to(tl.int64)
        stateful = place >= 0
    state = tl.zeros((BLOCK, D), tl.float32)
    if SPLIT:
        side = parts
        if BACKWARD:
            side = parts + tl.where(forward, 0, 1).to(tl.int64) * items * heads * (D * D)
        part_rows = (chunks_per_part * CHUNK).to(tl.float32)
        whole = tl.exp2(-rate * part_rows)
        for earlier in range(tl.maximum(part - _reach(rate, part_rows), 0), part):
            at = ((first_item + earlier) * heads + head) * (D * D)
            state = state * whole + _state(side + at, half, turned, True, D, BLOCK)
    if BOUND:
        source = initial
        if BACKWARD:
            if role != 0:
                source = final_grad
        state += _state(source + (place * heads + head) * (D * D), half, turned, stateful & (part == 0), D, BLOCK)

    if BACKWARD:  # token of the first chunk's first row, tokens from chunk to chunk, age of a row in its chunk
        line = tl.where(forward, 0, tokens - CHUNK)
        step = tl.where(forward, CHUNK, -CHUNK)
        time = tl.where(forward, row, CHUNK - 1 - row)
        gap = tl.where(forward, row[None, :] - row[:, None], row[:, None] - row[None, :])
    else:
        line = 0
        step = CHUNK
        time = row
        gap = row[None, :] - row[:, None]
    mask = tl.where(gap >= 0, tl.exp2(-rate * tl.maximum(gap, 0).to(tl.float32)), 0.0)
    age = tl.exp2(-rate * (CHUNK - lag - time).to(tl.float32))
    reading = tl.exp2(-rate * (time + lag).to(tl.float32))
    kept = tl.exp2(-rate * CHUNK)
    grade = -rate * (CHUNK - lag - time).to(tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        ageing = age
        keeping = kept
        if FINAL:  # the state after a short chunk does not age by the rows that are missing
            missing = rate * tl.where(chunk == chunks - 1, chunks * CHUNK - tokens, 0).to(tl.float32)
            ageing = tl.exp2(tl.minimum(grade + missing, 0.0))
            keeping = tl.exp2(missing - rate * CHUNK)
        state = _step(
            state, rows_a, rows_b, c, to, c_t, to_t, line + chunk * step, tokens, mask, reading, ageing, keeping,
            D, BLOCK, CHUNK, SILU, SCORES_FIRST, SCORE, OPERAND, PRECISION,
        )  # fmt: skip

    if FINAL:
        ends = stateful & (last == chunks) & (block[:, None] >= 0)
        if BACKWARD:
            ends = ends & (role == 2)
        tile = (half * BLOCK + block)[:, None] * D + column[None, :]
        tl.store(final + (place * heads + head) * (D * D) + tile, state, mask=ends)


@triton.jit(do_not_specialize=["heads", "documents", "length", "chunks_per_part", "items"])
def part_kernel(
    q, k, v, do, slopes, cu_seqlens, slots, initial, final_grad, parts,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    heads, documents, length, chunks_per_part, items,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    SILU: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that every part of a document adds by itself (its first part with the initial state), for SPLIT walks.

    Writes parts [sides, items, H, D, D], side 0 from k and v forward, side 1 (BACKWARD only) from q and do backward. The last
    part of a document is read by nobody and left unwritten, so a short chunk never comes. Tokens so far from the end of a part
    that their weight there is zero in fp32 are not read. Arguments as in `walk_kernel`.
    """
    HALVES: tl.constexpr = D // BLOCK
    pid = tl.program_id(0)
    row = tl.arange(0, CHUNK)
    column = tl.arange(0, D)
    block = tl.arange(0, BLOCK)
    if BACKWARD:
        side = pid % 2
        forward = side == 0
        rest = pid // 2
        b, b_t, b_h = tl.where(forward, k, q), tl.where(forward, k_t, q_t), tl.where(forward, k_h, q_h)
        c, c_t, c_h = tl.where(forward, v, do), tl.where(forward, v_t, do_t), tl.where(forward, v_h, do_h)
        lag = tl.where(forward, 1, 0)
    else:
        side = 0
        rest = pid
        b, b_t, b_h = k, k_t, k_h
        c, c_t, c_h = v, v_t, v_h
        lag = 1
    half = rest % HALVES
    rest = rest // HALVES
    head = (rest % heads).to(tl.int64)  # times a stride it can pass 2^31
    item = rest // heads
    document, start, tokens, part, first_item = _locate(
        item, cu_seqlens, documents, length, chunks_per_part, CHUNK, PACKED, True, WIDTH
    )
    chunks = (tokens + CHUNK - 1) // CHUNK
    rate = tl.load(slopes + head) * 1.4426950408889634
    last = (part + 1) * chunks_per_part
    needed = last < chunks
    first = tl.maximum(part * chunks_per_part, last - _reach(rate, CHUNK))
    last = tl.where(needed, last, first)
    begin = start.to(tl.int64)
    rows_b = _rows(b + begin * b_t + head * b_h, tokens, b_t, CHUNK, D)
    rows_c = _rows(c + begin * c_t + head * c_h + half * BLOCK, tokens, c_t, CHUNK, BLOCK)
    if BACKWARD:
        line = tl.where(forward, 0, tokens - CHUNK)
        step = tl.where(forward, CHUNK, -CHUNK)
        time = tl.where(forward, row, CHUNK - 1 - row)
    else:
        line = 0
        step = CHUNK
        time = row
    age = tl.exp2(-rate * (CHUNK - lag - time).to(tl.float32))
    kept = tl.exp2(-rate * CHUNK)
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
        begins = stateful & needed & (first == 0)
        state += _state(source + (place * heads + head) * (D * D), half, False, begins, D, BLOCK)
    for chunk in tl.range(first, last, num_stages=STAGES):
        offset = line + chunk * step
        xb = rows_b.load([offset, 0])
        xc = rows_c.load([offset, 0])
        if SILU:
            xb = _silu(xb, OPERAND)
            xc = _silu(xc, OPERAND)
        aged = tl.trans((xc.to(tl.float32) * age[:, None]).to(OPERAND))
        state = tl.dot(aged, xb.to(OPERAND), state * kept, input_precision=PRECISION)
    tile = (half * BLOCK + block)[:, None] * D + column[None, :]
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
