"""Random control flow and its meaning: structured programs printed as CUDA C++ and as Python, and
PTX of random basic blocks with a sequential interpreter.  Both are dense in what is easily got
wrong: registers carried round a loop, copied and overwritten in one block, written under a
predicate, or read after an early exit."""

import numpy as np

MASK = 0xFFFFFFFF
STATE = ("a", "b", "c", "d")


def signed(x):
    return x - (1 << 32) if x >> 31 else x


# ---- structured programs ---------------------------------------------------------------
PRELUDE = """
constexpr unsigned M = 0xFFFFFFFF;
#define pick(p, x, y) ((p) ? (x) : (y))
__device__ __forceinline__ unsigned lesser(unsigned x, unsigned y) { return x < y ? x : y; }
__device__ __forceinline__ int signed_(unsigned x) { return (int)x; }
"""
KERNELS = """
extern "C" __global__ void each{k}(const unsigned* n, const unsigned* columns, unsigned* out,
                                   int total) {{
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < total) out[i] = f{k}(n[i], columns[i], i);
}}
extern "C" __global__ void all{k}(unsigned n, unsigned columns, unsigned* out) {{
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = f{k}(n, columns, threadIdx.x & 3);
}}
"""
PREDICATED = {
    "add.u32": "({v} + {z}) & M",
    "sub.u32": "({v} - {z}) & M",
    "xor.b32": "{v} ^ {z}",
    "mov.b32": "{z}",
}


class Program:
    """A random function of (n, columns, t).  Expressions are text that is both C++ and Python
    (``and``, ``or`` and ``not`` are C++ too; ``:=`` becomes ``=``); statements are tuples.
    ``body``: a given program instead."""

    def __init__(self, rng, depth=3, body=None):
        self.rng, self.counters, self.scope = rng, 2 if body else 0, ()
        start = [("set", v, str(rng.choice((0, 1, 2, 5)))) for v in STATE] + [("set", "acc", "7")]
        self.body = start + (body or self.block(depth, 4, False))
        self.result = "(acc * 31 + a + b * 3 + c * 7 + d * 11) & M"
        space = {"signed_": signed, "M": MASK, "lesser": min, "pick": lambda p, x, y: x if p else y}
        lines = ["def run(n, columns, t):", *python_lines(self.body, 1), f" return {self.result}"]
        exec("\n".join(lines), space)
        self.run = space["run"]

    def cuda(self, name):
        declared = ", ".join((*STATE, "acc", *(f"i{k}" for k in range(1, self.counters + 1))))
        return "\n".join(
            [
                f"__device__ __forceinline__ unsigned {name}(unsigned n, unsigned columns, "
                f"unsigned t) {{",
                f"unsigned {declared};",
                *cuda_lines(self.body),
                f"return {self.result};",
                "}",
            ]
        )

    # ---- expressions
    def atom(self):
        return self.rng.choice(
            STATE + self.scope + ("n", "columns", "t", self.rng.choice(("1", "2", "3", "7", "31")))
        )

    def expression(self, depth=2):
        if depth == 0 or self.rng.random() < 0.25:
            return self.atom()
        x, y = self.expression(depth - 1), self.expression(depth - 1)
        form = self.rng.choice(
            (
                "({x} + {y}) & M",
                "({x} - {y}) & M",
                "({x} * {y}) & M",
                "{x} ^ {y}",
                "({x} << {k}) & M",
                "{x} >> {k}",
                "lesser({x}, {y})",
                "pick({p} < {q}, {x}, {y})",
            )
        )
        return (
            "("
            + form.format(x=x, y=y, k=self.rng.randint(1, 3), p=self.atom(), q=self.atom())
            + ")"
        )

    def condition(self, depth=1):
        if depth and self.rng.random() < 0.6:
            word = self.rng.choice(("and", "or", "and not", "or not"))
            return f"({self.condition(depth - 1)} {word} {self.condition(0)})"
        x, y = self.expression(1), self.expression(1)
        if self.rng.random() < 0.15:
            x, y = f"signed_({x})", f"signed_({y})"
        return f"({x} {self.rng.choice(('<', '<=', '>', '!=', '=='))} {y})"

    # ---- statements
    def block(self, depth, size, in_loop):
        return [self.statement(depth, in_loop) for _ in range(self.rng.randint(1, size))]

    def statement(self, depth, in_loop):
        r, v = self.rng.random(), self.rng.choice((*STATE, "acc"))
        if depth and r < 0.34:
            return self.loop(depth)
        if depth and r < 0.5:
            other = self.block(depth - 1, 2, in_loop) if self.rng.random() < 0.4 else []
            return ("if", self.condition(), self.block(depth - 1, 3, in_loop), other)
        if in_loop and r < 0.6:
            return (self.rng.choice(("break", "continue")), self.condition())
        if r < 0.68:
            return (
                "predicated",
                self.rng.choice(list(PREDICATED)),
                v,
                self.atom(),
                self.atom(),
                self.atom(),
            )
        if r < 0.75:
            return ("swap", v, self.rng.choice(STATE))
        return (
            "set",
            v,
            f"{self.expression()} & M"
            if v != "acc"
            else f"(acc * 5 + {self.rng.choice(STATE)}) & M",
        )

    def loop(self, depth):
        """Counts up to a bound, so that it ends; the other part of its condition is arbitrary."""
        rng, outer = self.rng, self.scope
        self.counters += 1
        i = f"i{self.counters}"
        start, step = rng.choice(((1, "* 2"), (1, "* 2"), (1, "* 3 + 1"), (0, "+ 1"), (0, "+ 3")))
        bound = rng.choice(("n", "(columns >> 2)", "((t & 7) + 2)", "lesser(n, columns)", "9"))
        bound = bound if "*" in step else f"lesser({bound}, 12)"
        other, form = self.condition(), rng.choice(("while", "while", "early", "do", "for", "test"))
        update = (i, f"({i} {step}) & M")
        if form == "test":  # the update is part of the exit test
            test = f"({i} := ({i} {step}) & M) < {bound} and {other}"
        else:
            test = rng.choice(
                (
                    f"{i} < {bound} and {other}",
                    f"{other} and {i} < {bound}",
                    f"{i} < {bound}",
                    f"not ({i} >= {bound} or {other})",
                    f"{i} < {bound} and {i} * 4 < columns",
                    f"({i} < {bound} or {i} < columns) and {i} < 40",
                )
            )
        self.scope += (i,)
        body = self.block(depth - 1, 3, True)
        self.scope = outer
        return ("loop", form, i, start, update, test, body)


def cuda_lines(statements, update=None):
    """``update``: what a ``continue`` has to do first."""
    out = []
    for kind, *s in statements:
        if kind == "set":
            out.append(f"{s[0]} = {s[1]};")
        elif kind == "swap":
            out.append(f"{{ unsigned s = {s[0]}; {s[0]} = {s[1]}; {s[1]} = s; }}")
        elif kind == "predicated":
            op, v, x, y, z = s
            out.append(
                f'asm volatile("{{ .reg .pred p; setp.lt.u32 p, %1, %2; @p {op} %0, '
                f'{"" if op == "mov.b32" else "%0, "}%3; }}" '
                f': "+r"({v}) : "r"({x}), "r"({y}), "r"({z}));'
            )
        elif kind == "if":
            out += [f"if ({s[0]}) {{", *cuda_lines(s[1], update), "}"]
            out += ["else {", *cuda_lines(s[2], update), "}"] if s[2] else []
        elif kind in ("break", "continue"):
            out.append(
                f"if ({s[0]}) {{ {update if kind == 'continue' and update else ''} {kind}; }}"
            )
        else:
            form, i, start, (_, value), test, body = s
            step, test = f"{i} = {value};", test.replace(":=", "=")
            inner = cuda_lines(body, step if form in ("while", "do") else None)
            head, tail = {
                "while": (f"while ({test}) {{", [step, "}"]),
                "do": ("do {", [step, f"}} while ({test});"]),
                "early": (f"while ({test}) {{ {step}", ["}"]),
                "test": (f"while ({test}) {{", ["}"]),
                "for": (f"for (; {test}; {step[:-1]}) {{", ["}"]),
            }[form]
            out += [f"{i} = {start};", head, *inner, *tail]
    return out


def python_lines(statements, level, at_continue=()):
    """``at_continue``: the lines that a ``continue`` stands for."""
    out, pad = [], " " * level
    for kind, *s in statements:
        if kind == "set":
            out.append(f"{pad}{s[0]} = {s[1]}")
        elif kind == "swap":
            out.append(f"{pad}{s[0]}, {s[1]} = {s[1]}, {s[0]}")
        elif kind == "predicated":
            op, v, x, y, z = s
            out.append(f"{pad}if {x} < {y}: {v} = {PREDICATED[op].format(v=v, z=z)}")
        elif kind == "if":
            out += [f"{pad}if {s[0]}:", *python_lines(s[1], level + 1, at_continue)]
            out += [f"{pad}else:", *python_lines(s[2], level + 1, at_continue)] if s[2] else []
        elif kind == "break":
            out.append(f"{pad}if {s[0]}: break")
        elif kind == "continue":
            out += [f"{pad}if {s[0]}:", *[pad + line for line in at_continue]]
        else:
            form, i, start, (_, value), test, body = s
            step, leave = f" {i} = {value}", f" if not ({test}): break"
            again = {
                "while": [step, " continue"],
                "for": [step, " continue"],
                "do": [step, leave, " continue"],
            }
            inner = python_lines(body, level + 1, again.get(form, [" continue"]))
            first = [] if form == "do" else [leave, step] if form == "early" else [leave]
            last = {"while": [step], "for": [step], "do": [step, leave]}.get(form, [])
            out += [
                f"{pad}{i} = {start}",
                f"{pad}while True:",
                *[pad + line for line in first],
                *inner,
                *[pad + line for line in last],
            ]
    return out


def cuda_source(programs):
    """Kernels each0, each1, ... (n and columns per thread) and all0, all1, ... (the same for all
    threads)."""
    return PRELUDE + "\n".join(
        p.cuda(f"f{k}") + KERNELS.format(k=k) for k, p in enumerate(programs)
    )


# ---- random basic blocks ------------------------------------------------------------------
R, P = [f"%r{i}" for i in range(5)], [f"%p{i}" for i in range(3)]
BINARY = {
    "add.u32": lambda x, y: x + y,
    "sub.u32": lambda x, y: x - y,
    "mul.lo.u32": lambda x, y: x * y,
    "xor.b32": lambda x, y: x ^ y,
    "min.u32": min,
    "and.pred": lambda x, y: x and y,
    "or.pred": lambda x, y: x or y,
}
COMPARE = {
    "setp.lt.u32": lambda x, y: x < y,
    "setp.ne.u32": lambda x, y: x != y,
    "setp.gt.s32": lambda x, y: signed(x) > signed(y),
}


class RandomBlocks:
    """Instructions are tuples (guard, negated, opcode, destination, sources).  The kernel takes
    five input arrays and five output arrays, one per register; ``%fuel`` ends every loop."""

    def __init__(self, rng, blocks=6, size=5):
        self.rng, self.code, self.labels = rng, [], {}
        for k in range(blocks):
            self.labels[f"L{k}"] = len(self.code)
            self.code += [self.instruction() for _ in range(rng.randint(1, size))]
            target = rng.randrange(blocks + 1)
            if target <= k:  # backwards, while there is fuel
                self.code += [
                    (None, False, "sub.u32", "%fuel", ("%fuel", 1)),
                    (None, False, "setp.gt.s32", "%more", ("%fuel", 0)),
                    (None, False, "and.pred", "%more", ("%more", rng.choice(P))),
                    ("%more", False, "bra", None, (f"L{target}",)),
                ]
            elif target > k + 1:
                self.code.append((rng.choice(P), rng.random() < 0.5, "bra", None, (f"L{target}",)))
        self.labels[f"L{blocks}"] = len(self.code)

    def instruction(self):
        rng = self.rng
        guard = (rng.choice(P), rng.random() < 0.5) if rng.random() < 0.25 else (None, False)
        r, d = rng.random(), rng.choice(R)
        if r < 0.3:
            return (*guard, "mov.b32", d, (rng.choice(R),))
        if r < 0.5:
            return (
                *guard,
                rng.choice([o for o in BINARY if "pred" not in o]),
                d,
                (rng.choice(R), rng.choice([*R, 1, 3])),
            )
        if r < 0.65:
            return (*guard, "shl.b32", d, (rng.choice(R), 1))
        if r < 0.75:
            return (*guard, "selp.b32", d, (rng.choice(R), rng.choice(R), rng.choice(P)))
        if r < 0.9:
            return (
                *guard,
                rng.choice(list(COMPARE)),
                rng.choice(P),
                (rng.choice(R), rng.choice([*R, 5])),
            )
        if r < 0.95:
            return (*guard, "mov.pred", rng.choice(P), (rng.choice(P),))
        return (
            *guard,
            rng.choice(("and.pred", "or.pred")),
            rng.choice(P),
            (rng.choice(P), rng.choice(P)),
        )

    def ptx(self):
        lines = []
        for k, (guard, negated, op, d, sources) in enumerate(self.code):
            lines += [f"{name}:" for name, at in self.labels.items() if at == k]
            operands = ", ".join(str(x) for x in ((d,) if d else ()) + sources)
            lines.append(
                (f"@{'!' if negated else ''}{guard} " if guard else "") + f"{op} {operands};"
            )
        lines += [f"{name}:" for name, at in self.labels.items() if at == len(self.code)]
        load = [
            f"ld.param.u64 %a, [in{i}]; add.u64 %a, %a, %o; ld.global.b32 {r}, [%a];"
            for i, r in enumerate(R)
        ]
        store = [
            f"ld.param.u64 %a, [out{i}]; add.u64 %a, %a, %o; st.global.b32 [%a], {r};"
            for i, r in enumerate(R)
        ]
        params = ", ".join(
            f".param .u64 {side}{i}" for side in ("in", "out") for i in range(len(R))
        )
        return "\n".join(
            [
                ".version 8.0\n.target sm_80\n.address_size 64",
                f".visible .entry k({params}, .param .u32 fuel)",
                "{",
                f".reg .b32 {', '.join(R)}, %fuel, %i, %w; .reg .pred {', '.join(P)}, %more; .reg "
                ".b64 %a, %o;",
                "mov.u32 %i, %ctaid.x; mov.u32 %w, %ntid.x; mul.lo.u32 %i, %i, %w; mov.u32 %w, "
                "%tid.x; add.u32 %i, %i, %w;",
                "mul.wide.u32 %o, %i, 4; ld.param.u32 %fuel, [fuel];",
                *load,
                *[f"setp.lt.u32 {p}, {R[i]}, {R[i + 1]};" for i, p in enumerate(P)],
                *lines,
                *store,
                "ret;",
                "}",
            ]
        )

    def run(self, values, fuel):
        """The registers of one thread at the end."""
        state = dict(
            zip(R, values, strict=False),
            **{"%fuel": fuel},
            **{p: values[i] < values[i + 1] for i, p in enumerate(P)},
        )
        pc = 0
        while pc < len(self.code):
            guard, negated, op, d, sources = self.code[pc]
            pc += 1
            if guard and state[guard] == negated:
                continue
            if op == "bra":
                pc = self.labels[sources[0]]
                continue
            x = [state.get(s, s) for s in sources]
            if op in COMPARE or op.endswith("pred"):
                state[d] = bool((COMPARE | BINARY)[op](*x) if len(x) > 1 else x[0])
            else:
                value = (
                    BINARY[op](*x)
                    if op in BINARY
                    else x[0] << x[1]
                    if op == "shl.b32"
                    else x[0]
                    if op == "mov.b32" or x[2]
                    else x[1]
                )
                state[d] = value & MASK
        return [state[r] for r in R]


def banded(rng, count, high):
    """Values that are equal along stretches of threads, so that the groups of threads are
    contiguous but not full."""
    out = np.zeros(count, np.uint32)
    at = 0
    while at < count:
        length = rng.choice((1, 7, 32, 50, 96, 128))
        out[at : at + length] = rng.randrange(high)
        at += length
    return out
