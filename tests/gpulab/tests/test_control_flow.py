"""Loops with carried registers and random control flow, against Python."""

import random

import control_flow as cf
import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

BOTH = "i1 < n and i1 * 4 < columns"
DOUBLE, COUNT = (1, ("i1", "(i1 * 2) & M")), (0, ("i1", "(i1 + 1) & M"))
LOOPS = {  # every one leaves its carried value in acc
    "while_and": [("loop", "while", "i1", *DOUBLE, BOTH, []), ("set", "acc", "i1")],
    "while_or": [
        ("loop", "while", "i1", *DOUBLE, "i1 < n or i1 * 4 < columns", []),
        ("set", "acc", "i1"),
    ],
    "while_bits": [
        ("loop", "while", "i1", *DOUBLE, "(i1 < n) & (i1 * 4 < columns)", []),
        ("set", "acc", "i1"),
    ],
    "while_not": [
        ("loop", "while", "i1", *DOUBLE, "not (i1 >= n or i1 * 4 >= columns)", []),
        ("set", "acc", "i1"),
    ],
    "do": [("loop", "do", "i1", *DOUBLE, BOTH, []), ("set", "acc", "i1")],
    "for": [("loop", "for", "i1", *DOUBLE, BOTH, [("set", "acc", "i1")])],
    "update_in_test": [
        ("loop", "test", "i1", *DOUBLE, "(i1 := (i1 * 2) & M) < n and i1 * 4 < columns", []),
        ("set", "acc", "i1"),
    ],
    "update_before_the_rest": [
        ("loop", "early", "i1", *DOUBLE, BOTH, [("set", "acc", "(acc * 5 + i1) & M")])
    ],
    "the_value_before": [
        (
            "loop",
            "while",
            "i1",
            *COUNT,
            "i1 < n and a < columns",
            [("set", "b", "a"), ("set", "a", "(a * 2 + 1) & M")],
        ),
        ("set", "acc", "b"),
    ],
    "fibonacci": [
        (
            "loop",
            "while",
            "i1",
            *COUNT,
            "i1 < (n & 15) and b < columns",
            [("swap", "a", "b"), ("set", "b", "(a + b) & M")],
        ),
        ("set", "acc", "(a * 1000 + b) & M"),
    ],
    "break": [
        (
            "loop",
            "while",
            "i1",
            *DOUBLE,
            BOTH,
            [("set", "c", "b"), ("set", "b", "(b + i1) & M"), ("break", "(b * 3 > columns)")],
        ),
        ("set", "acc", "(b * 64 + c) & M"),
    ],
    "continue": [
        (
            "loop",
            "for",
            "i1",
            *COUNT,
            "i1 < n and acc < columns",
            [
                ("set", "c", "acc"),
                ("continue", "((i1 & 3) == 1)"),
                ("set", "acc", "(acc + c + i1) & M"),
            ],
        )
    ],
    "nested": [
        (
            "loop",
            "while",
            "i1",
            *DOUBLE,
            BOTH,
            [
                (
                    "loop",
                    "do",
                    "i2",
                    1,
                    ("i2", "(i2 * 3) & M"),
                    "i2 < i1 and i2 * i1 < columns",
                    [("set", "d", "i2")],
                ),
                ("if", "(d > n)", [("swap", "a", "d")], [("set", "a", "i2")]),
            ],
        ),
        ("set", "acc", "(a * 77 + d + i1) & M"),
    ],
    "predicated": [
        (
            "loop",
            "while",
            "i1",
            *DOUBLE,
            BOTH,
            [
                ("predicated", "mov.b32", "a", "acc", "columns", "i1"),
                ("predicated", "add.u32", "acc", "i1", "n", "a"),
            ],
        ),
        ("set", "acc", "(acc * 64 + a) & M"),
    ],
    "select": [
        (
            "loop",
            "while",
            "i1",
            *DOUBLE,
            BOTH,
            [("set", "b", "a"), ("set", "a", "pick(i1 * 8 < columns, i1, b)")],
        ),
        ("set", "acc", "(a * 64 + b) & M"),
    ],
}
TARGETS = [(80, ()), (90, ()), (80, ("-Xcicc", "-O1")), (90, ("-Xcicc", "-O1")), (90, ("-G",))]


def check_each(module, k, program, n, columns, block, resident):
    out = np.zeros(n.size, np.uint32)
    module.launch(
        f"each{k}", -(-n.size // block), block, [n, columns, out, n.size], resident_ctas=resident
    )
    want = [
        program.run(int(x), int(y), i) for i, (x, y) in enumerate(zip(n, columns, strict=False))
    ]
    np.testing.assert_array_equal(out, np.array(want, np.uint32), f"each{k}")


def check_all(module, k, program, n, columns, block):
    out = np.zeros(2 * block, np.uint32)
    module.launch(f"all{k}", 2, block, [n, columns, out], resident_ctas=2)
    want = np.array([program.run(n, columns, t) for t in range(4)], np.uint32)
    np.testing.assert_array_equal(
        out, want[np.tile(np.arange(block) & 3, 2)], f"all{k}({n}, {columns})"
    )


@pytest.fixture(scope="module", params=TARGETS, ids=lambda t: "-".join(map(str, (t[0], *t[1]))))
def loops(request):
    programs = [cf.Program(random.Random(0), body=body) for body in LOOPS.values()]
    return cuda_module(cf.cuda_source(programs), *request.param), programs


@pytest.mark.parametrize("k", range(len(LOOPS)), ids=list(LOOPS))
def test_loops_with_a_two_part_condition(loops, k):
    module, programs = loops
    n, columns = (
        v.reshape(-1).astype(np.uint32)
        for v in np.meshgrid(np.arange(1, 65, 9), np.arange(1, 601, 5))
    )
    check_each(module, k, programs[k], n, columns, 96, 4)
    check_each(module, k, programs[k], n, columns, 100, 1)
    for n, columns in ((1, 1), (1, 264), (64, 264), (5, 600), (33, 17), (64, 600)):
        check_all(module, k, programs[k], n, columns, 100)
        check_all(module, k, programs[k], n, columns, 64)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(seed):
    """Structured programs through nvcc.  For a long search raise the range."""
    rng = random.Random(seed)
    programs = [cf.Program(rng) for _ in range(4)]
    module = cuda_module(cf.cuda_source(programs), *TARGETS[seed % len(TARGETS)])
    for k, program in enumerate(programs):
        for block, resident in ((100, 1), (128, 3)):
            n, columns = (cf.banded(rng, 640, high) + np.uint32(1) for high in (64, 600))
            check_each(module, k, program, n, columns, block, resident)
        for block in (32, 100):
            for _ in range(4):
                check_all(module, k, program, rng.randint(1, 64), rng.randint(1, 600), block)


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_random_blocks(first):
    """PTX of random basic blocks."""
    for seed in range(first, first + 15):
        rng = random.Random(seed)
        program = cf.RandomBlocks(rng, rng.randint(3, 9), rng.randint(2, 7))
        module = gpulab.Module(program.ptx())
        for block, grid, resident in ((100, 1, 1), (100, 2, 1), (64, 5, 3)):
            values = [cf.banded(rng, block * grid, high) for high in (8, 8, 40, 600, 1 << 32)]
            if grid == 1:
                values = [np.full_like(v, v[0]) for v in values]
            out, fuel = [np.zeros_like(v) for v in values], rng.choice((1, 3, 9))
            module.launch("k", grid, block, [*values, *out, fuel], resident_ctas=resident)
            want = {}
            for row in set(zip(*(v.tolist() for v in values), strict=False)):
                want[row] = program.run(row, fuel)
            want = [want[row] for row in zip(*(v.tolist() for v in values), strict=False)]
            np.testing.assert_array_equal(
                np.stack(out, axis=1), np.array(want, np.uint32), f"seed {seed}"
            )


BLOCK = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .u32 one)
{{
  .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<4>;
  mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mul.lo.u32 %r0, %r0, %r1;
  mov.u32 %r1, %tid.x; add.u32 %r0, %r0, %r1;
  mul.wide.u32 %rd0, %r0, 4; ld.param.u64 %rd1, [out]; add.u64 %rd1, %rd1, %rd0;
  ld.param.u32 %r1, [one];
  {code}
  st.global.b32 [%rd1], %r2;
  ret;
}}
"""


def run(code, threads=100, ctas=1):
    """out[i] = %r2 of thread i, whose index is in %r0; %r1 is 1."""
    out = np.zeros(threads * ctas, np.uint32)
    gpulab.Module(BLOCK.format(code=code)).launch("k", ctas, threads, [out, 1], resident_ctas=ctas)
    return out


@pytest.mark.parametrize(
    "threads,ctas", [(32, 1), (100, 1), (128, 600)]
)  # a full group, a partial one, two pieces
def test_a_register_copied_and_overwritten_in_one_block(threads, ctas):
    for old, new in (("%r2", "%r3"), ("%r3", "%r2")):  # whichever is stored first
        code = (
            f"add.u32 {new}, %r0, 5; bra A; A: mov.b32 {old}, {new}; shl.b32 {new}, {new}, 1; bra "
            "B; B: "
            f"sub.u32 %r4, {new}, {old}; mov.b32 %r2, %r4;"
        )
        assert (run(code, threads, ctas) == np.arange(threads * ctas) + 5).all()


def test_a_predicate_copied_and_overwritten_before_a_branch():
    code = (
        "setp.lt.u32 %p{0}, %r0, 50; mov.u32 %r2, 1; bra A; A: mov.pred %p{1}, %p{0}; setp.lt.u32 "
        "%p{0}, %r0, 10; "
        "@%p{1} bra B; mov.u32 %r2, 2; B: @%p{0} add.u32 %r2, %r2, 4;"
    )
    for first, second in ((0, 1), (1, 0)):
        t = np.arange(100)
        assert (run(code.format(first, second)) == np.where(t < 50, 1, 2) + 4 * (t < 10)).all()


def test_operands_of_a_predicated_barrier():
    """The id and count are made in the barrier's own block and are not needed after it."""
    code = (
        "mov.u32 %r2, 7; setp.lt.u32 %p0, %r0, 64; bra A; A: shl.b32 %r4, %r1, 6; add.u32 %r3, "
        "%r1, 1; "
        "@%p0 bar.sync %r3, %r4; bar.sync 1, 96;"
    )
    assert (run(code, 96) == 7).all()
