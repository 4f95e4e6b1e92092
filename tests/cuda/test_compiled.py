"""The CUDA kernels as nvcc compiles them: budgets of the machine code of every specialisation that the dispatch may ask
for, and that the gates notice what they are for. Where Triton is, its own kernel of the same tile is read too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.backends import needs_triton
from helpers.cuda_driver import StandIn
from helpers.hopper import (
    COMMON,
    DTYPES,
    SPECIALISATIONS,
    Code,
    Specialisation,
    compiled_by_nvcc,
    disassembled,
    said_wrong,
    spread,
    wrong,
)

pytestmark = needs_triton

KERNELS = ROOT / "csrc" / "cuda"
FORWARD, _, _, BACKWARD, MIRRORED, _ = COMMON
NARROW = Specialisation("backward", 64, "fp16")


def found_wrong(specialisation: Specialisation, folder: Path, kernels: Path = KERNELS) -> list[str]:
    cubin, log = compiled_by_nvcc(specialisation, folder, kernels)
    code = Code.of(disassembled(cubin, folder))
    return [*said_wrong(log), *wrong(code, specialisation)]


@pytest.mark.parametrize("specialisation", spread([NARROW]))
def test_machine_code_keeps_its_budgets(specialisation, tmp_path):
    """No spills, no warning, registers within what each warpgroup asked for, tensor-core instructions that do not wait
    for one another, boxes that come and go as often as the design says; and the shared memory is that of the launch."""
    assert found_wrong(specialisation, tmp_path) == []


# A change of a kernel and what is then wrong.
CHANGES = {
    "fewer registers": (FORWARD, "tiles.cuh", "take_registers<240>", "take_registers<176>", "spilled"),
    "more registers than there are": (FORWARD, "tiles.cuh", "take_registers<240>", "take_registers<248>", "fewer"),
    "sums that are touched meanwhile": (
        FORWARD,
        "tiles.cuh",
        "ptx::wgmma(d[part], a + k * 2, b + k * 2, step > 0 || k > 0);",
        "ptx::wgmma(d[part], a + k * 2, b + k * 2, step > 0 || k > 0); d[part][k] += 1.0f;",
        "a warning: .*serialized",
    ),
    "no stage on its way": (FORWARD, "tiles.cuh", "kInFlight = 1", "kInFlight = 0", "waits for products"),
    "a step too few": (FORWARD, "tiles.cuh", "k < kDepth / 16;", "k < kDepth / 16 - 1;", "6 HGMMA"),
    "a box twice": (
        FORWARD,
        "tiles.cuh",
        "ptx::tma_load(stage,",
        "ptx::tma_load(stage, *operands.x[0], 0, 0, full); ptx::tma_load(stage,",
        "UTMALDG",
    ),
    "stored instead of added": (BACKWARD, "softmax_backward.cu", "ptx::tma_add(", "ptx::tma_store(", "0 UTMAREDG"),
    "an exponential for each direction": (
        BACKWARD,
        "softmax_backward.cu",
        "out = e * (",
        "out = ptx::exp2(e) * (",
        "512 MUFU.EX2 instead of 384",
    ),
    "other shared memory": (
        MIRRORED,
        "softmax_backward.cu",
        "kBytes = (kUsed + 1023)",
        "kBytes = (kUsed + 2047)",
        "static assertion failed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kernel_that_is_changed_for_the_worse_is_refused(change, tmp_path):
    specialisation, file, before, after, expected = CHANGES[change]
    changed = tmp_path / "changed"
    shutil.copytree(KERNELS, changed)
    text = (changed / file).read_text()
    assert text.count(before) == 1
    (changed / file).write_text(text.replace(before, after))
    try:
        found = found_wrong(specialisation, tmp_path, changed)
    except AssertionError as error:
        found = [str(error)]
    assert re.search(expected, "\n".join(found)), found


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Of the forward pass, disassembled."""
    folder = tmp_path_factory.mktemp("code")
    return disassembled(compiled_by_nvcc(FORWARD, folder, KERNELS)[0], folder)


def test_registers_are_counted_where_they_are_taken(code):
    """A warpgroup that asked for fewer than it takes; a wide instruction takes all of its own."""
    whole = Code.of(code)
    products = next(place for place, each in enumerate(whole.instructions) if each.startswith("HGMMA"))
    assert len(whole.registers[products]) == 64
    producer, consumers = (whole.reached_from(f"USETMAXREG.{each}") for each in ("DEALLOC", "TRY_ALLOC"))
    assert not producer & consumers and len(producer) > 100 and len(consumers) > 500
    assert all(("UTMALDG" in whole.instructions[place]) <= (place in producer) for place in producer | consumers)
    for asked, other, where in ((0xF0, 0xE0, "TRY_ALLOC to 224"), (0x18, 0x4, "DEALLOC to 4")):
        changed = re.sub(rf"(USETMAXREG.* ){asked:#x}\b", rf"\g<1>{other:#x}", code)
        assert any(where in each for each in wrong(Code.of(changed), FORWARD))


def test_products_that_wait_for_the_one_before_are_seen(code):
    changed = re.sub(r"(HGMMA[^;\n]*[^0]) ;", r"\1, gsb0 ; \n /*0000*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", code)
    found = list(wrong(Code.of(changed), FORWARD))
    assert "products wait for the ones before" in found and any("waits for products" in each for each in found)


# Beside Triton's own kernel of the same tile.

SHAPE = (128, 128, 64)


@pytest.fixture(scope="module", params=DTYPES)
def beside(request):
    """A dtype, and Triton's kernel with boxes and products of the same tile, compiled ahead of time."""
    from helpers import interpreter

    arguments = [request.param, list(SHAPE)]
    return request.param, interpreter.result_of("helpers.beside", "compiled", *arguments, TRITON_INTERPRET="0")


def test_matrix_descriptors_are_tritons(beside, tmp_path):
    """Swizzle, groups of rows and the steps along a row; save the distance along it, which with a swizzle as long as
    the row has no meaning, and which the manual asks to be 1."""
    dtype, triton = beside
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH: there is no PTX of the CUDA kernels")
    file, _, macros, _ = Specialisation("forward", 512, dtype).kernel
    command = [nvcc, "-ptx", "-std=c++17", "-arch=sm_90a", *(f"-D{name}={value}" for name, value in macros)]
    subprocess.run([*command, "-o", tmp_path / "ptx", KERNELS / file], check=True)
    own, other = (descriptors(text) for text in ((tmp_path / "ptx").read_text(), triton["ptx"]))
    assert len(own) == len(other) == 4
    assert {each ^ 1 << 16 for each in own} == other
    swizzles = {each >> 62 for each in own}
    strides = {(each >> 32 & 0x3FFF) << 4 for each in own}
    assert swizzles == {1} and strides == {1024}  # 128 bytes; of 8 rows


def descriptors(ptx: str) -> set[int]:
    """The constants that are put to an address to make a descriptor of a matrix."""
    numbers = re.findall(r"(?:or\.b64|add\.s64)\s+%rd\d+, %rd\d+, (\d+);", ptx)
    return {int(number) for number in numbers if int(number) >> 62}


def test_tensor_maps_are_tritons(beside, monkeypatch):
    """As Triton's host code passes them to the driver, from what the compiled kernel asks for."""
    import torch
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    from softclip_kernels.backends.cuda import driver, tensor_map
    from softclip_kernels.backends.triton import sm90

    dtype, triton = beside
    stand_in = StandIn({})
    opened = driver.Driver(stand_in)
    monkeypatch.setattr(tensor_map, "driver", lambda: opened)
    x, y = torch.zeros(2, 300, 512, dtype=DTYPES[dtype])
    for box in sm90._boxes(x, y):
        tensor_map.TensorMap.of(box.matrix, box.shape)
    of_x, of_y = stand_in.encoded
    boxes = [each["block_size"] for each in triton["boxes"]]
    assert boxes == [[128, 64], [128, 64]]
    assert of_y.box == boxes[1][::-1] and of_x.box == [64, boxes[0][0] // 2]  # half of a tile's rows at once
    for own, other in zip(stand_in.encoded, triton["boxes"], strict=True):
        interleave, swizzle, _, fill = own.options
        assert (own.dtype, swizzle) == (TMA_DTYPE_DEVICE_TO_HOST[other["elem_type"]], other["swizzle"])
        assert (interleave, fill) == (0, 0) and own.steps == [1, 1] and not other["fp4_padded"]
        assert own.sizes == [512, 300] and own.strides == [512 * other["elem_size"]]


def test_every_specialisation_has_macros_of_its_own():
    kernels = [each.kernel for each in SPECIALISATIONS]
    assert len(set(kernels)) == len(kernels) == 48
    assert all(shared_bytes <= 227 * 1024 for *_, shared_bytes in kernels)
