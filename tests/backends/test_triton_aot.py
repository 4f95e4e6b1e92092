"""The Triton kernels compiled for GPUs that are not at hand: budgets of the machine code, and 64-bit addresses."""

from __future__ import annotations

import pytest
from helpers import interpreter
from helpers.backends import needs_triton

from softclip_kernels.backends.triton.shapes import SPILLED, SPILLED_WITH_BIASES, TMA

pytestmark = needs_triton

# What a tensor core's instruction is called.
INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
# About 100 variants each, in parts, so that they spread over processors. Half of them are compiled for sm_90, which the
# kernels are tuned for, of the others an eighth; the rest in test-long.
ARCHITECTURES, PARTS = ("sm_80", "sm_90", "sm_100", "gfx942"), 8
COMPILED = [
    pytest.param(architecture, part, marks=[pytest.mark.long] * (part >= (4 if architecture == "sm_90" else 1)))
    for architecture in ARCHITECTURES
    for part in range(PARTS)
]
HARD_FORWARD, BACKWARD = ("forward", "forward-persistent"), ("backward", "backward-persistent")
RESERVED = 1024  # bytes of shared memory that the chip takes for every program, beside its own
WITHOUT_PRODUCTS = ("coefficients", "sums", "norms", "scalars", "finish", "total", "loss", "adjoint")
# Exponentials of a whole tile on its usual way. A pair of tiles with a tied teacher takes one for each of the two.
EXPONENTIALS = {
    ("none", False): 1,
    ("logits", True): 1,
    ("logits", False): 2,
    ("embeddings", False): 2,
    ("transposed", True): 2,
    ("transposed", False): 4,
}


@pytest.mark.parametrize(("architecture", "part"), COMPILED)
def test_compiled_code_keeps_its_budgets(architecture, part):
    """No spills but those that are allowed, shared memory within the chip's, tensor-core instructions that on sm_90 do
    not wait for one another, and the design's number of matrix products and exponentials a tile. A process of its own,
    whatever TRITON_INTERPRET is here."""
    rows = interpreter.result_of("bench.aot.machine_code", "table", [architecture], PARTS, part, TRITON_INTERPRET="0")
    assert {row["kernel"] for row in rows} >= {"forward", "backward"}
    problems = [f"{row['variant']}: {problem}" for row in rows for problem in over_budget(row)]
    assert not problems, "\n".join(problems)


def over_budget(row):
    # The sums' kernel, whose work is O(N), may keep 8 bytes on the stack; the online one, which rarely works, 64.
    allowed = SPILLED.get(row["way"], {"sums": 8, "online": 64}.get(row["kernel"], 0))
    if row["plain"] and "biases" in row["variant"]:
        allowed = max(allowed, SPILLED_WITH_BIASES)
    if row["spilled"] > allowed:
        yield f"{row['spilled']} bytes spilled"
    if row["together"] * (row["shared"] + RESERVED) > row["shared_limit"] + RESERVED:
        yield f"{row['together']} x {row['shared']} bytes of shared memory, more than {row['shared_limit']}"
    if row["narrow_offsets"]:
        yield f"32-bit products in addresses: {row['narrow_offsets']}"
    if row["kernel"] in WITHOUT_PRODUCTS:
        return
    if not any(name.startswith(INSTRUCTIONS[row["architecture"]]) for name in row["tensor"]):
        yield f"no {INSTRUCTIONS[row['architecture']]} among {row['tensor']}"
    # A product in three of tf32, which fp32 operands take, has one that waits. No other product has any.
    if row["architecture"] == "sm_90" and row["serialized"] > (row["matmuls"] if row["three_products"] else 0):
        yield f"{row['serialized']} wgmma wait for the one before"
    if row["kernel"] == "products":  # of each gradient, whole steps along the sum and the rest
        sums = ("gx" in row["variant"]) + ("gy" in row["variant"])
        if row["matmuls"] != 2 * sums:
            yield f"{row['matmuls']} matrix products for {sums} sums"
        return
    # One load of each operand in the loop, more before it: the pipeline's. A barrier in the loop forbids that.
    if row["way"] == TMA and row["tile_loads"] <= 2:
        yield f"{row['tile_loads']} UTMALDG: boxes do not come ahead of time"
    # A plain sum over a tile's rows would be a tree of shuffles for each column, about 200.
    if (
        row["architecture"] == "sm_90"
        and row["kernel"] in HARD_FORWARD
        and row["mode"] == "none"
        and row["shuffles"] > 70
    ):
        yield f"{row['shuffles']} shuffles"
    teacher_only = "teacher-only" in row["variant"]
    one_product = row["kernel"] == "exchange" or (teacher_only and row["kernel"] == "backward")
    if row["matmuls"] != (1 if one_product else 1 + (row["mode"] in ("embeddings", "transposed"))):
        yield f"{row['matmuls']} matrix products"
    # In range one for both parts where they share it, else one a part; out of range two a part.
    if row["kernel"] == "exchange" and row["exponentials"][2] != (5 if row["tied"] else 6):
        yield f"{row['exponentials'][2]} exponentials in the code"
    if row["kernel"] in (*HARD_FORWARD, *BACKWARD):
        yield from _over_budget_of_exponentials(row, 1 if teacher_only else EXPONENTIALS[row["mode"], row["tied"]])


def _over_budget_of_exponentials(row, budget):
    """On the usual way as the design says; a tile of the backward pass that leaves fp32's range takes one for each
    direction of each softmax instead, in a branch beside it."""
    directions = 2 if "teacher-only" in row["variant"] else {"none": 2, "transposed": 8}.get(row["mode"], 4)
    exact = directions if row["kernel"] in BACKWARD else budget
    usual, rare, everything = row["exponentials"]
    if (usual, rare) != (budget, exact):
        yield f"{usual} to {rare} exponentials an entry instead of {budget} to {exact}"
    if everything != (budget + exact if row["kernel"] in BACKWARD else budget):
        yield f"{everything} exponentials in the code"
    # The compiler may take an exponential again, in another layout, rather than move it: with masks, and where a tile
    # is stored transposed. More often than that, and warps do each other's work. Both branches are in the code.
    repeated = 2.1 if not row["plain"] else 1.5 if row["mode"] == "transposed" else 1.1
    if row["exponentials_issued"] > repeated * everything * row["entries"]:
        yield f"{row['exponentials_issued']} exponential instructions for {row['entries']} entries"


@pytest.mark.parametrize("kind", (*HARD_FORWARD, *BACKWARD, "exchange", "online", "products", *WITHOUT_PRODUCTS))
def test_every_argument_has_its_type_beside_the_kernel(kind):
    """In the kernel's order; and what may be None has a feature that brings it."""
    from bench.aot.variants import FEATURES, KERNELS

    module, name = KERNELS[kind]
    taken = getattr(module, name).arg_names
    assert list(module.ARGUMENTS) == [argument for argument in taken if not argument.isupper()]
    assert all(argument.isupper() for argument in taken[len(module.ARGUMENTS) :]), "constants come last (call.py)"
    assert {argument for argument, of in module.ARGUMENTS.items() if of.endswith("?")} <= FEATURES.keys()


def test_exponentials_are_counted_along_branches():
    from bench.aot.machine_code import exponentials

    power = "%1 = math.exp2 %0 : tensor<8x8xf32>"
    code = f"""
    {power}
    %2 = scf.for %k = %a to %b iter_args(%c = %d) -> (tensor<8x8xf32>) : i32 {{
    }} loc(#loc1)
    %3 = scf.if %in_range -> (tensor<8x8xf32>) {{
      {power}
      scf.if %inner {{
        {power}
      }} loc(#loc2)
    }} else {{
      {power}
      {power}
      {power}
    }} loc(#loc3)
    %9 = math.exp2 %0 : tensor<8xf32>
    """
    assert exponentials(code, "tensor<8x8xf32") == [2, 4, 6]


def test_serialized_tensor_instructions_are_counted():
    from bench.aot.machine_code import serialized

    product, last = (
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;\n",
        "HGMMA.64x256x16 R24, gdesc[UR8], R24, gsb0 ;\n",
    )
    wait, barrier = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n", "BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"
    assert serialized(3 * product + last + wait + barrier + 3 * product + last + wait) == 0
    assert serialized(4 * (last + wait)) == 3


def test_the_check_of_addresses_finds_what_it_looks_for():
    from bench.aot.machine_code import narrow_offsets

    code = """
    %c64_i32 = arith.constant 64 : i32
    %0 = tt.get_program_id x : i32
    %1 = arith.muli %0, %c64_i32 : i32
    %2 = tt.splat %1 : i32 -> tensor<64xi32>
    %3 = arith.addi %2, %range : tensor<64xi32>
    %4 = tt.splat %stride : i32 -> tensor<64xi32>
    %5 = arith.muli %3, %4 : tensor<64xi32>
    %6 = tt.addptr %x, %5 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
    """
    assert len(narrow_offsets(code)) == 1 and narrow_offsets(code)[0].startswith("%5")
    wide = code.replace("%5 = arith.muli %3, %4 : tensor<64xi32>", "%5 = arith.muli %3, %4 : tensor<64xi64>")
    assert narrow_offsets(wide) == []
