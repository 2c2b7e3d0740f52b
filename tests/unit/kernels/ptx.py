"""Runs the PTX of one warpgroup on the host: the few instructions that `thin`'s kernels use.

Threads run in step, so that branches have to be the same in all of them. Shared memory is full of rubbish
at first, and what `cp.async` copies arrives no earlier than it is waited for.
"""

import re

import ml_dtypes
import numpy as np

THREADS = 128
LINE = re.compile(r"^(?:@(!?)(\w+) )?([\w.:]+)(?: (.*))?;$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def bf16_pair(words):
    """[n] uint32 to [n, 2] float32, the low half first."""
    return words.astype(np.uint32).view(ml_dtypes.bfloat16).reshape(-1, 2).astype(np.float32)


def to_words(pairs):
    return np.ascontiguousarray(pairs.astype(ml_dtypes.bfloat16)).view(np.uint32).reshape(-1)


class Machine:
    """Global memory of some arrays, and the registers and shared memory of a warpgroup."""

    def __init__(self, arrays):
        self.at, size = [], 4096  # an address of 0 is nowhere
        for array in arrays:
            self.at.append(size)
            size += array.nbytes + -array.nbytes % 4096
        self.memory = np.zeros(size, np.uint8)
        for start, array in zip(self.at, arrays, strict=True):
            self.memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)

    def array(self, index, like):
        start = self.at[index]
        return self.memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)

    def run(self, text, shared_bytes, item):
        """The whole text, for the warpgroup whose first item is `item`."""
        rubbish = np.random.default_rng(item).integers(0, 256, shared_bytes)
        self.shared = rubbish.astype(np.uint8)
        self.copies, self.groups = [], []
        names = [*self.at, 0, item, np.arange(THREADS)]
        self.registers = {f"${n}": np.broadcast_to(v, THREADS) for n, v in enumerate(names)}
        lines = [line for line in text[2:-2].split("\n") if not line.startswith(".reg")]
        self.labels = {line[:-1]: n for n, line in enumerate(lines) if line.endswith(":")}
        program = [LINE.match(line) for line in lines]
        place = 0
        while place < len(lines):
            if (match := program[place]) is None:
                assert lines[place].endswith(":"), lines[place]
                place += 1
                continue
            inverted, condition, opcode, operands = match.groups()
            mask = np.full(THREADS, True)
            if condition:
                mask = self.registers[condition].astype(bool) ^ bool(inverted)
            if opcode == "bra":
                assert mask.all() or not mask.any(), lines[place]
                place = self.labels[operands] if mask.all() else place + 1
                continue
            self.execute(opcode, OPERAND.findall(operands or ""), mask)
            place += 1

    def value(self, name):
        if name in self.registers:
            return self.registers[name]
        if name.startswith("0f"):
            return np.full(THREADS, np.uint32(int(name[2:], 16))).view(np.float32)
        return np.full(THREADS, int(name, 0))

    def write(self, name, value, mask):
        before = self.registers.get(name, np.zeros_like(value))
        self.registers[name] = np.where(mask, value, before).astype(value.dtype)

    def address(self, text):
        base, _, offset = text[1:-1].partition(" + ")
        return self.value(base).astype(np.int64) + int(offset or 0)

    def execute(self, opcode, operands, mask):
        kind, *rest = opcode.split(".")
        if kind in ("ld", "st", "cp"):
            return self.move(opcode, operands, mask)
        if kind == "bar":
            return None
        if kind == "mma":
            return self.multiply(*(text[1:-1].split(", ") for text in operands))
        target, *sources = operands
        values = [self.value(source) for source in sources]
        return self.write(target, self.compute(kind, rest, values), mask)

    def compute(self, kind, rest, v):
        number = rest[-1]
        if number == "f32" and kind in ("mov", "add"):
            return v[0] if kind == "mov" else (v[0] + v[1]).astype(np.float32)
        if number == "bf16x2":
            a, b = bf16_pair(v[0]), bf16_pair(v[1])
            return to_words(a - b if kind == "sub" else a * b)
        if rest[:2] == ["rn", "bf16x2"]:  # cvt, the second operand in the low half
            return to_words(np.stack([v[1], v[0]], axis=1))
        if kind in ("setp", "min"):
            dtype = np.int32 if number == "s32" else np.uint32
            a, b = (x.astype(np.int64).astype(np.uint32).view(dtype) for x in v)
            if kind == "min":
                return np.minimum(a, b).view(np.uint32)
            return {"lt": a < b, "eq": a == b, "gt": a > b}[rest[0]]
        if number == "pred":
            return {"mov": lambda a: a, "not": np.logical_not, "or": np.logical_or}[kind](*v)
        if kind == "redux":
            sums = v[0].reshape(-1, 32).sum(axis=1).astype(np.uint32)
            return np.repeat(sums, 32)
        wide = [x.astype(np.uint64) for x in v]
        result = {
            "mov": lambda a: a,
            "cvt": lambda a: a,
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "mad": lambda a, b, c: a * b + c,
            "and": lambda a, b: a & b,
            "xor": lambda a, b: a ^ b,
            "shr": lambda a, b: a >> b,
            "shl": lambda a, b: a << b,
            "div": lambda a, b: a // b,
            "rem": lambda a, b: a % b,
            "prmt": permute,
            "lop3": lambda a, b, c, _: (a & b) ^ c,  # the only table in use
        }[kind](*wide)
        is_wide = "wide" in rest or number in ("u64", "b64") or rest[:1] == ["u64"]
        return result if is_wide else result.astype(np.uint32)

    def multiply(self, sums, weight, rows, _):
        """m16n8k16 for each of four warps."""
        for warp in range(THREADS // 32):
            mine = slice(32 * warp, 32 * warp + 32)
            lane = np.arange(32)
            c, t = lane // 4, lane % 4
            a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
            for n, name in enumerate(weight):
                for e in range(2):
                    half = bf16_pair(self.registers[name][mine])[:, e]
                    a[c + 8 * (n % 2), 2 * t + e + 8 * (n // 2)] = half
            for n, name in enumerate(rows):
                for e in range(2):
                    b[2 * t + e + 8 * n, c] = bf16_pair(self.registers[name][mine])[:, e]
            product = a @ b
            for n, name in enumerate(sums):
                self.registers[name] = self.registers[name].copy()
                self.registers[name][mine] += product[c + 8 * (n // 2), 2 * t + n % 2]

    def move(self, opcode, operands, mask):
        if opcode.startswith("cp.async"):
            return self.copy(opcode, operands, mask)
        space = self.shared if ".shared" in opcode else self.memory
        first = opcode.startswith("ld")
        registers, place = operands if first else operands[::-1]
        names = registers.strip("{}").split(", ")
        address = self.address(place)
        for n, name in enumerate(names):
            where = address[mask, None] + 4 * n + np.arange(4)
            if first:
                words = np.zeros(THREADS, np.uint32)
                words[mask] = np.ascontiguousarray(space[where]).view(np.uint32)[:, 0]
                dtype = np.float32 if opcode.endswith("f32") else np.uint32
                self.write(name, words.view(dtype), mask)
            else:
                words = np.ascontiguousarray(self.registers[name][mask])
                space[where] = words.view(np.uint8).reshape(-1, 4)
        return None

    def copy(self, opcode, operands, mask):
        if opcode == "cp.async.commit_group":
            self.groups.append(self.copies)
            self.copies = []
        elif opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            keep = int(operands[0]) if operands else 0
            while len(self.groups) > keep:
                for where, data in self.groups.pop(0):
                    self.shared[where] = data
        else:
            target, source, size = operands
            span = np.arange(int(size))
            where = self.address(target)[mask, None] + span
            self.copies.append((where, self.memory[self.address(source)[mask, None] + span]))


def permute(a, b, pattern):
    """prmt.b32 without its modes."""
    both = a | (b << np.uint64(32))
    result = np.zeros_like(a)
    for n in range(4):
        pick = (pattern >> np.uint64(4 * n)) & np.uint64(7)
        result |= ((both >> (pick * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * n)
    return result
