"""The CUDA kernels' specialisations, and what the machine code of one says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from softclip_kernels.backends.cuda import nvrtc, sources
from softclip_kernels.backends.cuda.kernels import OPTIONS

KINDS = ("forward", "forward pair", "forward mirrored", "backward", "backward mirrored", "backward mirrored tied")
WIDTHS = (64, 128, 320, 512)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
THREADS, WARPGROUP = 384, 128
REGISTERS = 65536  # of a multiprocessor
WAITS = {  # what an instruction that waits for products leaves on its way
    "WARPGROUP.DEPBAR.LE gsb0, 0x0": 0,
    "WARPGROUP.DEPBAR.LE gsb0, 0x1": 1,
}


@dataclass(frozen=True)
class Specialisation:
    kind: str
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.width}, {self.dtype}"

    @property
    def parts(self) -> int:
        """Blocks of G that a tile brings something to."""
        return 0 if self.forward else 1 + self.mirrored

    @property
    def forward(self) -> bool:
        return self.kind.startswith("forward")

    @property
    def mirrored(self) -> bool:
        return "mirrored" in self.kind

    @property
    def pair(self) -> bool:
        """Two products of a tile."""
        return self.kind in ("forward pair", "forward mirrored")

    @property
    def kernel(self) -> tuple[str, str, tuple[tuple[str, str | int], ...], int]:
        """File, name, macros and bytes of shared memory, as the dispatch asks for it."""
        from softclip_kernels.backends.triton import sm90

        x = torch.empty(1, self.width, dtype=DTYPES[self.dtype])
        if self.forward:
            return sm90._forward_pair_kernel(x, self.mirrored) if self.pair else sm90._forward_kernel(x)
        return sm90._backward_kernel(x, self.mirrored, self.kind.endswith("tied"))

    @property
    def exponentials(self) -> int:
        """In the code, of a thread's 128 products: the forward pass has them for whole tiles and for others; a tile of
        the backward pass one for each softmax, shared where that is the same, and out of range one for each direction
        of each."""
        backward = {"backward": 1 + 2, "backward mirrored": 2 + 4, "backward mirrored tied": 1 + 4}
        return 128 * backward.get(self.kind, 2)


SPECIALISATIONS = [
    Specialisation(kind, width, dtype) for width in reversed(WIDTHS) for dtype in DTYPES for kind in KINDS
]
COMMON = [each for each in SPECIALISATIONS if (each.width, each.dtype) == (512, "bf16")]


def spread(also: Sequence[Specialisation] = ()) -> list[Any]:
    """All as parameters of a test, of which these few are not long: the usual width, and `also`."""
    return [
        pytest.param(each, id=str(each), marks=[] if each in (*COMMON, *also) else pytest.mark.long)
        for each in SPECIALISATIONS
    ]


# Tools.


def tool(name: str) -> str | None:
    """Of the disassemblers that triton brings, or those that come with nvcc."""
    try:
        import triton
    except ImportError:
        return shutil.which(name)
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else shutil.which(name)


def disassembled(cubin: bytes, folder: Path) -> str:
    """With the registers that each instruction reads and writes, where the disassembler knows: not of the cubin of
    another CUDA. Skips where there is no disassembler."""
    path, nvdisasm = folder / "read.cubin", tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("no nvdisasm (it comes with triton and with nvcc): the machine code was not read")
    path.write_bytes(cubin)
    done = subprocess.run([nvdisasm, "-c", "-plr", "-lrm", "wide", path], capture_output=True, text=True)
    if "life ranges" in done.stderr:
        done = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def layout(specialisation: Specialisation) -> str:
    """A text that includes the kernel, and holds only where it lays out what the dispatch takes for granted."""
    from softclip_kernels.backends.triton import sm90

    file, _, _, shared_bytes = specialisation.kernel
    shape = sm90.SM90_PAIR if specialisation.pair else sm90.SM90_SHAPE
    epilogue = ("PairSums" if specialisation.pair else "Sums") if specialisation.forward else "Entries"
    facts = [
        f"Own::kOffset + Own::kBytes == {shared_bytes}",
        "Own::kOffset % 8 == 0 && kStage % 1024 == 0 && kEpilogue % 1024 == 0",
        f"kThreads == {sm90.THREADS} && kStageRows == {sm90._stage_rows(shape)} && kDepth == {sm90.DEPTH}",
        f"kRows == {shape.block_m} && kColumns == {shape.block_n}",
    ]
    if not specialisation.forward:
        facts.append("Entries::kBytes % 1024 == 0")
        facts.append(f"Entries::kBoxBytes == {2 * sm90.G_BOX[0] * sm90.G_BOX[1]}")
        facts.append(f"Entries::kBoxColumns == {sm90.G_BOX[1]}")
        facts.append(f"kStore == {sm90.STORE} && kAdd == {sm90.ADD}")
    asserts = [f'static_assert({fact}, "layout");' for fact in facts]
    return "\n".join([f'#include "{file}"', f"using Own = Barriers<{epilogue}::kBytes>;", *asserts])


def compiled_by_nvcc(specialisation: Specialisation, folder: Path, kernels: Path) -> tuple[bytes, str]:
    """The cubin and what the assembler said, of the texts in the folder `kernels`. Skips without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH: the CUDA kernels were not compiled by it")
    text, cubin = folder / "specialised.cu", folder / "compiled.cubin"
    text.write_text(layout(specialisation))
    macros = [f"-D{name}={value}" for name, value in specialisation.kernel[2]]
    target = ["-gencode", "arch=compute_90a,code=sm_90a"]
    command = [nvcc, "-cubin", "-std=c++17", "-lineinfo", *target, "-Xptxas", "-v", f"-I{kernels}", *macros]
    done = subprocess.run([*command, "-o", cubin, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin.read_bytes(), done.stderr


def compiled_by(compiler: nvrtc.Nvrtc, specialisation: Specialisation) -> bytes:
    """As the library compiles it."""
    file, _, macros, _ = specialisation.kernel
    options = [*OPTIONS, *(f"--define-macro={name}={value}" for name, value in macros)]
    return compiler.compile(file, sources.text(file), sources.headers(), options)


# Machine code.


@dataclass
class Code:
    """The instructions of a kernel, as nvdisasm has them, and the registers that each reads or writes: where the text
    does not tell, as many as its name says."""

    instructions: list[str]
    registers: list[set[int]]
    following: list[list[int]]  # places of the instructions that may be next

    @staticmethod
    def of(text: str) -> Code:
        columns: dict[int, int] = {}  # where a register's mark stands, of the one that is meant
        instructions, registers, labels = [], [], {}
        for line in text.splitlines():
            code, _, lives = line.partition("// |")
            if not columns and re.match(r"\s*# 0 1 2", lives):
                numbers = list(re.finditer(r"\d+", lives.partition("|")[0]))
                columns = {number.end() - 1: int(number.group()) for number in numbers}
            if label := re.match(r"([.$\w]+):", code):
                labels[label[1]] = len(instructions)
            if instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code):
                marks = lives.partition("|")[0]
                instructions.append(instruction[1])
                read = {r for at, r in columns.items() if at < len(marks) and marks[at] in "^vx"}
                if "CALL." in instruction[1]:  # marked with all that a function might take; its own are its code's
                    read = set()
                registers.append(read if columns else _named(instruction[1]))
        return Code(instructions, registers, [_next(place, each, labels) for place, each in enumerate(instructions)])

    def count(self, operation: str) -> int:
        return sum(operation in each for each in self.instructions)

    def operations(self) -> Counter[str]:
        """How often each is there, by its whole name."""
        return Counter(re.sub(r"^@!?U?P\w+ ", "", each).split()[0] for each in self.instructions)

    def reached_from(self, operation: str) -> set[int]:
        """The places of all instructions that may follow one of this name, itself included."""
        to_do = [place for place, each in enumerate(self.instructions) if operation in each]
        found: set[int] = set()
        while to_do:
            place = to_do.pop()
            if place not in found and place < len(self.instructions):
                found.add(place)
                to_do += self.following[place]
        return found

    def registers_of(self, places: set[int]) -> int:
        """How many they take: one more than the highest."""
        return 1 + max((register for place in places for register in self.registers[place]), default=-1)


def _named(instruction: str) -> set[int]:
    """The registers of an instruction by its text, which names the first of several."""
    first = {int(number) for number in re.findall(r"\bR(\d+)\b", instruction)}
    sizes = {"HGMMA.64x128": 64, ".128": 4, ".64": 2, ".WIDE": 2}
    size = next((size for name, size in sizes.items() if name in instruction), 1)
    return {number + more for number in first for more in range(size)}


def _next(place: int, instruction: str, labels: dict[str, int]) -> list[int]:
    if re.match(r"RET\b", instruction):  # names the kernel that it goes back to
        return []
    targets = [labels[name] for name in re.findall(r"`\(([^)]+)\)", instruction) if name in labels]
    ends = re.match(r"(BRA|EXIT)\b(?! U?P| !U?P)(?!\.DIV)", instruction)
    return targets if ends else [place + 1, *targets]


def said_wrong(log: str) -> Iterator[str]:
    """What the assembler's words (-v) tell of spills, and its warnings."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if len(spills) != 1:
        yield f"{len(spills)} functions instead of one"
    for stack, stores, loads in spills:
        if (stack, stores, loads) != ("0", "0", "0"):
            yield f"{stack} bytes of stack, {stores} bytes of stores and {loads} of loads spilled"
    for line in log.splitlines():
        if re.search(r"warning|serializ|Performance Loss|C7\d\d\d", line, re.IGNORECASE):
            yield f"a warning: {line}"


def wrong(code: Code, of: Specialisation) -> Iterator[str]:
    """What in the machine code is not as it should be."""
    from bench.aot.machine_code import serialized

    yield from _wrong_registers(code)
    spilled = [each for each in code.instructions if re.search(r"\b(STL|LDL)\b", each)]
    if spilled:
        yield f"{len(spilled)} accesses of local memory"
    steps, dtype = of.width // 64, ".BF16" if of.dtype == "bf16" else ""
    panel = steps * (1 + of.pair)
    operations = code.operations()
    expected = {
        f"HGMMA.64x128x16.F32{dtype}": {8},  # two parts of a step, in fours; one loop over the steps
        # The loop over a tile's stages once or unrolled, beside the panels' steps.
        "UTMALDG.2D": {panel + 1, panel + 2 * steps},
        "UTMASTG.2D": {4 * of.parts},  # of every quarter
        "UTMAREDG.2D.ADD": {4 * of.parts},
        "MUFU.EX2": {of.exponentials},
    }
    for name, counts in expected.items():
        prefix = name.split(".")[0]
        found = sum(count for each, count in operations.items() if each.startswith(f"{prefix}."))
        if prefix == "MUFU":
            found = operations[name]
        elif found != operations[name]:
            yield f"{prefix} of another form: {[each for each in operations if each.startswith(prefix)]}"
        if found not in counts:
            yield f"{found} {name} instead of {' or '.join(map(str, sorted(counts)))}"
    # One for all at a tile's end; before it one stage stays on its way, of which a single step waits once.
    waits = {left: code.count(name) for name, left in WAITS.items()}
    if waits != {0: 1, 1: 1 if steps == 1 else 2}:
        yield f"waits for products, by how many stages they leave on their way: {waits}"
    if code.count("DEPBAR.LE gsb") != sum(waits.values()):
        yield "waits for products that leave others on their way"
    if serialized("\n".join(f"{each} ;" for each in code.instructions)):
        yield "products wait for the ones before"


def _wrong_registers(code: Code) -> Iterator[str]:
    """Producer and consumers keep to what they asked for, and that is what there is."""
    asked = {}
    for operation in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
        numbers = [int(each.split()[-1], 16) for each in code.instructions if operation in each]
        if len(numbers) != 1:
            yield f"{len(numbers)} {operation}"
            return
        (asked[operation],) = numbers
        taken = code.registers_of(code.reached_from(operation))
        if taken > asked[operation]:
            yield f"{taken} registers after {operation} to {asked[operation]}"
    producer, consumer = asked.values()
    # Those of a launch are all that the three share: as many for each thread, in steps of 8.
    if WARPGROUP * (producer + 2 * consumer) > THREADS * (REGISTERS // THREADS // 8 * 8):
        yield f"{producer} and twice {consumer} registers a thread, and a block has fewer"
