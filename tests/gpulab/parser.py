"""PTX text -> kernels, instructions and operands.

The parser knows the shape of PTX (directives, scopes, operands), not the
meaning of the instructions; that is in the ``ops_*`` modules.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import PtxSyntaxError

TYPE_BYTES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "e4m3": 1,
    "e5m2": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# Instructions whose first operand is a source, not a destination.
NO_DESTINATION = {
    "st",
    "red",
    "bra",
    "bar",
    "barrier",
    "ret",
    "exit",
    "membar",
    "fence",
    "trap",
    "cp",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "brkpt",
    "discard",
    "applypriority",
    "call",
    "stmatrix",
    "griddepcontrol",
    "brx",
    "pmevent",
    "setmaxnreg",
}


@dataclass(frozen=True)
class Reg:
    name: str
    slot: int
    dtype: object  # numpy dtype of the register file array (bool for predicates)


@dataclass(frozen=True)
class Imm:
    kind: str  # "int", "f32", "f64" (the last two hold raw bits) or "float"
    value: object


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Sym:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    base: object  # Reg, Sym or Imm
    offset: int


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Pair:  # d|p of setp and shfl
    first: object
    second: object


@dataclass(frozen=True)
class Not:
    reg: Reg


@dataclass(frozen=True)
class Sink:  # "_"
    pass


@dataclass
class Loc:
    file: str
    line: int
    inlined_at: object = None

    def __str__(self):
        text = f"{self.file}:{self.line}"
        return text + (f" (inlined at {self.inlined_at})" if self.inlined_at else "")


class Instr:
    """One PTX instruction."""

    def __init__(self, text, line, guard, op, mods, operands, loc):
        self.text, self.line = text, line
        self.guard = guard  # None or (Reg, negated)
        self.op, self.mods, self.operands = op, mods, operands
        self.types = [m for m in mods if m in TYPE_BYTES]
        self.loc = loc
        self.pc = -1
        self.target = None  # branch target (instruction index)
        self._writes = self._reads = None

    @property
    def type(self):
        return self.types[-1] if self.types else None

    def where(self):
        source = f"  [source {self.loc}]" if self.loc else ""
        return f"PTX line {self.line}: {self.text}{source}"

    def writes(self):
        """Registers that it writes."""
        if self._writes is None:
            self._writes = self._written()
        return self._writes

    def reads(self):
        """Registers whose values it needs."""
        if self._reads is None:
            self._reads = self._needed()
        return self._reads

    def _written(self):
        if self.op == "barrier" or self.op == "bar":
            return _regs(self.operands[0]) if "red" in self.mods else []
        if self.op in NO_DESTINATION or not self.operands:
            return []
        if self.op == "mbarrier" and not any(
            m in ("arrive", "arrive_drop", "test_wait", "try_wait", "pending_count")
            for m in self.mods
        ):
            return []
        return [] if isinstance(self.operands[0], Mem) else _regs(self.operands[0])

    def _needed(self):
        has_dst = bool(self.writes()) or (self.operands and isinstance(self.operands[0], Sink))
        regs = [r for o in (self.operands[1:] if has_dst else self.operands) for r in _regs(o)]
        if self.guard:
            regs.append(self.guard[0])
            regs += self.writes()  # a predicated write keeps old lanes
        return regs


def _regs(operand):
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Not):
        return [operand.reg]
    if isinstance(operand, Mem):
        return _regs(operand.base)
    if isinstance(operand, Vec):
        return [r for item in operand.items for r in _regs(item)]
    if isinstance(operand, Pair):
        return _regs(operand.first) + _regs(operand.second)
    return []


@dataclass
class Param:
    name: str
    nbytes: int
    align: int
    offset: int = 0


@dataclass
class Variable:
    """A .shared, .global, .const or .local declaration."""

    name: str
    space: str
    align: int
    nbytes: int  # 0 for "extern []" (dynamic shared memory)
    init: bytes = b""
    address: int = 0


@dataclass
class Kernel:
    name: str
    params: list
    instrs: list = field(default_factory=list)
    registers: list = field(default_factory=list)
    shared: list = field(default_factory=list)
    local: list = field(default_factory=list)
    reqntid: tuple = None
    maxntid: tuple = None
    reqcluster: tuple = None
    param_bytes: int = 0
    static_shared: int = 0
    local_bytes: int = 0


_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.S)
_LABEL = re.compile(r"([\w$%.]+)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(loc|file|version|target|address_size|alias)\b[^\n]*")
_INSTR = re.compile(r"(?:@(!?)\s*([\w$%.]+)\s+)?([a-z][\w]*)((?:\.[\w:]+)*)\s*(.*)$", re.S)
_INT = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_SPECIALS = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo|"
    r"globaltimer_hi|lanemask_(eq|lt|le|gt|ge)|cluster_ctarank|cluster_nctarank|is_explicit_cluster|"
    r"dynamic_smem_size|total_smem_size|aggr_smem_size|envreg\d+|pm\d+)$"
)


_SPACE = re.compile(r"\s*")
_BRACKET = re.compile(r"[\[{(]")
#: Text without its end, for each set of characters that ends it outside quotes.
_UNTIL = {ends: re.compile(rf'[^"{ends}]*(?:"[^"]*"[^"{ends}]*)*') for ends in (";", "{}", "{;")}
_HEX_F32 = re.compile(r"0[fF][0-9a-fA-F]{8}$")
_HEX_F64 = re.compile(r"0[dD][0-9a-fA-F]{16}$")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$")
_SYMBOL = re.compile(r"([\w$%.]+)\s*(?:([+-])\s*(\d+))?$")
_ADDRESS = re.compile(r"(\S+?)\s*(?:\+\s*(-?\s*\w+))?$")


def _strip_comments(text):
    def keep_newlines(m):
        return m.group(0) if m.group(0)[0] == '"' else "\n" * m.group(0).count("\n") or " "

    return _COMMENT.sub(keep_newlines, text)


def split_operands(text):
    """Split at commas that are not inside brackets."""
    if not _BRACKET.search(text):
        return [p for p in map(str.strip, text.split(",")) if p]
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


class PtxParser:
    """Parses one PTX module: ``.kernels``, ``.variables`` (module scope) and ``.target``."""

    def __init__(self, text):
        self.text = _strip_comments(text)
        self.pos, self.line = 0, 1
        self.files, self.kernels, self.variables = {}, {}, {}
        self.functions = set()
        self.target = None
        self._locs = []
        self._parse_module()
        for loc in self._locs:  # .file directives may follow their uses
            while loc is not None:
                loc.file = self.files.get(loc.file, loc.file)
                loc = loc.inlined_at

    # ---- scanning -------------------------------------------------------
    def _advance(self, n):
        self.line += self.text.count("\n", self.pos, self.pos + n)
        self.pos += n

    def _skip_space(self):
        m = _SPACE.match(self.text, self.pos)
        self._advance(m.end() - self.pos)
        return self.pos < len(self.text)

    def _take_until(self, chars):
        """Text up to (not including) the first of ``chars`` outside quotes; consumes both."""
        end = _UNTIL[chars].match(self.text, self.pos).end()
        if end == len(self.text) or self.text[end] == '"':
            raise PtxSyntaxError(f"unterminated statement at line {self.line}")
        body = self.text[self.pos : end]
        self._advance(end - self.pos + 1)
        return body, self.text[end]

    def _skip_braces(self):
        depth = 0
        while True:
            _, c = self._take_until("{}")
            depth += 1 if c == "{" else -1
            if depth == 0:
                return

    # ---- module scope ---------------------------------------------------
    def _parse_module(self):
        while self._skip_space():
            m = _LINE_DIRECTIVE.match(self.text, self.pos)
            if m:
                self._line_directive(m.group(0))
                self._advance(len(m.group(0)))
            elif self.text.startswith(".section", self.pos):
                self._skip_braces()
            else:
                rest = self.text[self.pos : self.pos + 200]
                if re.match(r"(\.\w+\s+)*\.(entry|func)\b", rest):
                    self._parse_function()
                else:
                    line = self.line
                    body, _ = self._take_until(";")
                    self._declaration(body.strip(), line, None, [{}])

    def _line_directive(self, text):
        words = text.split(None, 1)
        if words[0] == ".file":
            m = re.match(r'(\d+)\s+"([^"]*)"', words[1])
            if m:
                self.files[int(m.group(1))] = m.group(2)
        elif words[0] == ".target":
            self.target = words[1].split(",")[0].strip()

    def _parse_function(self):
        header, end = self._take_until("{;")
        m = re.search(r"\.entry\s+([\w$]+)", header)
        if not m:
            name = re.search(r"\.func\s*(?:\([^)]*\)\s*)?([\w$]+)", header)
            self.functions.add(name.group(1) if name else "?")
            if end == "{":
                self._advance(-1)
                self._skip_braces()
            return
        kernel = Kernel(m.group(1), [])
        rest = header[m.end() :]
        if rest.lstrip().startswith("("):
            close = rest.index(")")
            self._parse_params(kernel, rest[rest.index("(") + 1 : close])
            rest = rest[close + 1 :]
        for key in ("reqntid", "maxntid", "reqnctapercluster"):
            d = re.search(rf"\.{key}\s+([\d,\s]+)", rest)
            if d:
                dims = [int(v) for v in re.findall(r"\d+", d.group(1))]
                dims = tuple(dims + [1] * (3 - len(dims)))
                setattr(kernel, "reqcluster" if key == "reqnctapercluster" else key, dims)
        if end == ";":
            return
        self._parse_body(kernel)
        self.kernels[kernel.name] = kernel

    def _parse_params(self, kernel, text):
        offset = 0
        for part in split_operands(text):
            name = re.search(r"([\w$]+)\s*(\[(\d+)\])?\s*$", part)
            kind = re.search(r"\.([busf]\d+)\b", part).group(1)
            nbytes = TYPE_BYTES[kind] * int(name.group(3) or 1)
            explicit = re.match(r"\.param\s+\.align\s+(\d+)", part)
            align = int(explicit.group(1)) if explicit else TYPE_BYTES[kind]
            offset = -(-offset // align) * align
            kernel.params.append(Param(name.group(1), nbytes, align, offset))
            offset += nbytes
        kernel.param_bytes = offset

    # ---- declarations ---------------------------------------------------
    def _declaration(self, text, line, kernel, scopes):
        """Handle a directive statement (starts with '.')."""
        if not text:
            return
        if text.startswith(".reg"):
            m = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", text, re.S)
            kind = m.group(1)
            dtype = np.bool_ if kind == "pred" else UINT.get(TYPE_BYTES.get(kind, 4))
            for name in split_operands(m.group(2)):  # dtype None: b128, a pair of 64-bit registers
                r = re.match(r"([\w$%.]+)<(\d+)>$", name)
                names = [f"{r.group(1)}{i}" for i in range(int(r.group(2)))] if r else [name]
                for n in names:
                    scopes[-1][n] = (dtype, [None])
            return
        m = re.search(r"\.(shared|global|const|local)\b", text)
        if not m or text.startswith(".pragma"):
            return
        space = m.group(1)
        decl, _, init = text.partition("=")
        kind = re.search(
            r"\.(b8|u8|s8|b16|u16|s16|f16|bf16|b32|u32|s32|f32|b64|u64|s64|f64|b128)\b", decl
        ).group(1)
        name = re.search(r"([\w$%]+)\s*((?:\[[^\]]*\]\s*)*)$", decl.strip())
        dims = re.findall(r"\[([^\]]*)\]", name.group(2))
        count = 1
        for d in dims:
            count *= int(d) if d.strip() else 0
        align = re.search(r"\.align\s+(\d+)", decl)
        align = max(int(align.group(1)) if align else 1, TYPE_BYTES[kind])
        var = Variable(name.group(1), space, align, TYPE_BYTES[kind] * count)
        if init.strip():
            var.init = self._initialiser(init, kind, var, line)
        if space == "shared" and kernel is not None:
            kernel.shared.append(var)
        elif space == "local" and kernel is not None:
            kernel.local.append(var)
        else:
            self.variables[var.name] = var

    def _initialiser(self, text, kind, var, line):
        size = TYPE_BYTES[kind]
        raw = b""
        for word in re.findall(r"[^{},\s]+", text):
            value = self._immediate(word)
            if value is None:
                raise PtxSyntaxError(
                    f"unsupported initialiser {word!r} of {var.name} at line {line}"
                )
            if value.kind == "float":
                raw += np.array(value.value, np.float64 if size == 8 else np.float32).tobytes()
            else:
                raw += (value.value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return raw

    # ---- function bodies ------------------------------------------------
    def _parse_body(self, kernel):
        scopes, loc, depth = [{}], None, 0
        # Operands that were met, for each scope; one that declares nothing shares its parent's.
        known = [{}]
        scope_ids, next_scope, labels, branches = [0], 1, {}, []
        while True:
            if not self._skip_space():
                raise PtxSyntaxError(f"kernel {kernel.name} is not closed")
            c = self.text[self.pos]
            if c == "{":
                scopes.append({})
                known.append(known[-1])
                scope_ids.append(next_scope)
                next_scope += 1
                depth += 1
                self._advance(1)
                continue
            if c == "}":
                self._advance(1)
                if depth == 0:
                    break
                scopes.pop()
                known.pop()
                scope_ids.pop()
                depth -= 1
                continue
            m = _LINE_DIRECTIVE.match(self.text, self.pos)
            if m:
                if m.group(1) == "loc":
                    loc = self._parse_loc(m.group(0))
                else:
                    self._line_directive(m.group(0))
                self._advance(len(m.group(0)))
                continue
            m = _LABEL.match(self.text, self.pos)
            if m:
                labels[scope_ids[-1], m.group(1)] = len(kernel.instrs)
                self._advance(m.end() - self.pos)
                continue
            line = self.line
            body, _ = self._take_until(";")
            body = body.strip()
            if body.startswith("."):
                self._declaration(body, line, kernel, scopes)
                known[-1] = {}
            elif body:
                ins = self._instruction(body, line, loc, kernel, scopes, known[-1])
                kernel.instrs.append(ins)
                if ins.op == "bra":
                    branches.append((ins, tuple(scope_ids)))
        for ins, path in branches:  # labels are local to their { } scope
            name = ins.operands[0].name
            found = [labels[i, name] for i in reversed(path) if (i, name) in labels]
            if not found:
                raise PtxSyntaxError(f"unknown label {name} at line {ins.line}")
            ins.target = found[0]
        self._layout(kernel)

    def _parse_loc(self, text):
        words = text.replace(",", " ").split()
        loc = Loc(int(words[1]), int(words[2]))
        if "inlined_at" in words:
            i = words.index("inlined_at")
            loc.inlined_at = Loc(int(words[i + 1]), int(words[i + 2]))
        self._locs.append(loc)
        return loc

    def _instruction(self, text, line, loc, kernel, scopes, known):
        m = _INSTR.match(text)
        if not m:
            raise PtxSyntaxError(f"cannot parse {text!r} at line {line}")
        neg, pred, op, mods, rest = m.groups()
        guard = None
        if pred:
            guard = (self._register(pred, kernel, scopes), bool(neg))
            if guard[0] is None:
                raise PtxSyntaxError(f"unknown guard predicate {pred} at line {line}")
        mods = tuple(x for x in mods.split(".") if x)
        clean = " ".join(text.split())
        if op == "call":
            operands = [Sym(s) for s in re.findall(r"[\w$]+", rest)]
        else:
            operands = []
            for word in split_operands(rest):
                if word not in known:
                    known[word] = self._operand(word, line, kernel, scopes)
                operands.append(known[word])
        return Instr(clean, line, guard, op, mods, operands, loc)

    def _register(self, name, kernel, scopes):
        for scope in reversed(scopes):
            if name in scope:
                dtype, cell = scope[name]
                if cell[0] is None:
                    halves = (
                        [Reg(name, len(kernel.registers), dtype)]
                        if dtype is not None
                        else [
                            Reg(f"{name}.{half}", len(kernel.registers) + i, np.uint64)
                            for i, half in enumerate(("lo", "hi"))
                        ]
                    )
                    kernel.registers += halves
                    cell[0] = halves[0] if dtype is not None else Vec(tuple(halves))
                return cell[0]
        return None

    @staticmethod
    def _immediate(s):
        if _HEX_F32.match(s):
            return Imm("f32", int(s[2:], 16))
        if _HEX_F64.match(s):
            return Imm("f64", int(s[2:], 16))
        m = _INT.match(s)
        if m:
            digits = m.group(1)
            octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
            value = int(digits, 8) if octal else int(digits, 0)
            return Imm("int", -value if s[0] == "-" else value)
        if _FLOAT.match(s):
            return Imm("float", float(s))
        return Imm("int", 32) if s == "WARP_SZ" else None

    def _operand(self, s, line, kernel, scopes):
        s = s.strip()
        if s == "_":
            return Sink()
        if s[0] == "{":
            return Vec(
                tuple(self._operand(x, line, kernel, scopes) for x in split_operands(s[1:-1]))
            )
        if s[0] == "[":
            return self._memory(s[1:-1].strip(), line, kernel, scopes)
        if s[0] == "!":
            return Not(self._operand(s[1:], line, kernel, scopes))
        if "|" in s:
            a, b = s.split("|")
            return Pair(
                self._operand(a, line, kernel, scopes), self._operand(b, line, kernel, scopes)
            )
        reg = self._register(s, kernel, scopes)
        if reg is not None:
            return reg
        imm = self._immediate(s)
        if imm is not None:
            return imm
        if _SPECIALS.match(s):
            return Special(s[1:])
        m = _SYMBOL.match(s)
        if m and not s.startswith("%"):
            offset = int(m.group(3) or 0)
            return Sym(m.group(1), -offset if m.group(2) == "-" else offset)
        raise PtxSyntaxError(f"cannot parse operand {s!r} at line {line}")

    def _memory(self, s, line, kernel, scopes):
        s = s.partition(",")[0].strip()  # [map, {coordinates}] of tensor copies: not executable
        m = _ADDRESS.match(s)
        if not m:
            raise PtxSyntaxError(f"cannot parse address [{s}] at line {line}")
        base = self._operand(m.group(1), line, kernel, scopes)
        offset = int(m.group(2).replace(" ", ""), 0) if m.group(2) else 0
        if isinstance(base, Sym):
            base, offset = Sym(base.name), offset + base.offset
        return Mem(base, offset)

    def _layout(self, kernel):
        for i, ins in enumerate(kernel.instrs):
            ins.pc = i
        kernel.static_shared = _assign(kernel.shared)
        kernel.local_bytes = -(-_assign(kernel.local) // 16) * 16


def _assign(variables):
    """Give consecutive aligned addresses; returns the total size."""
    end = 0
    for v in variables:
        v.address = -(-end // v.align) * v.align
        end = v.address + v.nbytes
    return end
