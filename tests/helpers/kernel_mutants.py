"""Kernels of csrc/cuda/ with one thing wrong: each wait, release, fence and phase, and what else a reader might change
without seeing what it is for. The emulator must find every one of them under some seed."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .emulated import EmulatorError
from .emulated_kernels import drawn, wrong
from .emulated_problem import KERNELS, Specialization
from .pair_mutants import MIRROR, SUMS, TILES

SEEDS = 200
FORWARD = Specialization("forward", 128)
BACKWARD = Specialization("backward", 128)
MIRRORED = Specialization("backward", 64, mirror=True)
PAIR = Specialization("pair", 128)
PAIR_MIRRORED = Specialization("pair", 64, mirror=True)

# Rows, columns, blocks: several panels of several tiles; panels of one tile, which consumers skip in turns; a share
# that begins with the last tile of a panel; few tiles for many blocks.
SIZES = ((300, 300, 1), (90, 700, 1), (300, 300, 4), (520, 200, 3))
SQUARES = ((300, 300, 1), (129, 129, 1), (300, 300, 4))
# Super-blocks beside the diagonal, for a kernel that knows where it is, and squares for it: a share of each panel that
# begins with the tile on the diagonal, or after it.
BESIDE = ((300, 300, 2, (0, 256, 256, 300)), (300, 300, 3, (0, 128, 128, 300)), (520, 520, 3))


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    specialization: Specialization

    def write(self, folder: Path) -> Path:
        """The kernels' folder with this mutation."""
        shutil.copytree(KERNELS, folder)
        text = (folder / self.file).read_text()
        if text.count(self.old) != 1:
            raise LookupError(f"{self.name}: {self.file} has {text.count(self.old)} times, not once: {self.old}")
        (folder / self.file).write_text(text.replace(self.old, self.new))
        return folder


def runs(specialization: Specialization, library: ctypes.CDLL) -> Iterator[str | None]:
    """What is wrong, or None, under one seed after another, over small problems in turns."""
    problems = []
    sizes = SQUARES if specialization.mirror else SIZES
    for n, m, blocks, *ranges in (*sizes, *BESIDE) if specialization == PAIR_MIRRORED else sizes:
        problems.append((*drawn(specialization, n, m, ranges=ranges[0] if ranges else None), blocks))
    for seed in range(SEEDS):
        problem, gradient, blocks = problems[seed % len(problems)]
        try:
            yield wrong(specialization, library, problem, gradient, blocks, seed)
        except EmulatorError as error:
            yield str(error)


def caught(mutant: Mutant, folder: Path) -> tuple[int, str] | None:
    """The first seed that finds it, and how; None if none does."""
    name = f"mutant-{MUTANTS.index(mutant)}"
    library = mutant.specialization.build(folder, mutant.write(folder / name), name, optimize=False)
    for seed, found in enumerate(runs(mutant.specialization, library)):
        if found is not None:
            return seed, found.split("\n")[0]
    return None


def _mutants(file: str, specialization: Specialization, table: dict[str, tuple[str, str]]) -> list[Mutant]:
    return [Mutant(name, file, old, new, specialization) for name, (old, new) in table.items()]


RELEASE = "        if (thread == 0) ptx::mbarrier_arrive(barriers.empty(read.stage));\n"  # in the loop

MUTANTS = [
    *_mutants(
        "tiles.cuh",
        FORWARD,
        {
            # The barriers' beginning.
            "no fence of the initialization": ("    ptx::mbarrier_init_fence();\n", ""),
            "no sync after the initialization": ("  ptx::block_sync();\n", ""),
            "full waits for two": ("mbarrier_init(barriers.full(stage), 1)", "mbarrier_init(barriers.full(stage), 2)"),
            "empty waits for two": (
                "mbarrier_init(barriers.empty(stage), 1)",
                "mbarrier_init(barriers.empty(stage), 2)",
            ),
            "panel_full waits for two": (
                "mbarrier_init(barriers.panel_full(), 1)",
                "mbarrier_init(barriers.panel_full(), 2)",
            ),
            "panel_empty waits for one": (
                "mbarrier_init(barriers.panel_empty(), 2)",
                "mbarrier_init(barriers.panel_empty(), 1)",
            ),
            "two barriers in one place": ("return base + 16 * kStages + 8;", "return base + 16 * kStages;"),
            "barriers in the epilogue's memory": ("kOffset = kEpilogue + 2 * kEpilogueBytes", "kOffset = kEpilogue"),
            "nobody gives registers": ("    ptx::give_registers<24>();\n", ""),
            "too many registers are taken": ("take_registers<240>", "take_registers<248>"),
            # The producer.
            "no wait for an empty panel": (
                "      ptx::mbarrier_wait(barriers.panel_empty(), (share.nth_panel(number) & 1) ^ 1);\n",
                "",
            ),
            "phase of an empty panel": ("(share.nth_panel(number) & 1) ^ 1", "share.nth_panel(number) & 1"),
            "phase of an empty panel stays": ("(share.nth_panel(number) & 1) ^ 1", "1"),
            "half of the panel is expected": (
                "kPanels * kSteps * kPanelStep);\n      for",
                "kPanels * kSteps * kPanelStep / 2);\n      for",
            ),
            "no wait for an empty stage": (
                "      ptx::mbarrier_wait(barriers.empty(position.stage), position.parity ^ 1);\n",
                "",
            ),
            "phase of an empty stage": ("position.parity ^ 1", "position.parity"),
            "phase of an empty stage stays": ("position.parity ^ 1", "1"),
            "half of a stage is expected": (
                "mbarrier_expect(full, kStageBytes)",
                "mbarrier_expect(full, kStageBytes / 2)",
            ),
            "no bytes of a stage are expected": ("mbarrier_expect(full, kStageBytes)", "mbarrier_arrive(full)"),
            "a stage is expected after the wait of none": (
                "      ptx::mbarrier_expect(full, kStageBytes);\n",
                "",
            ),
            "stages lie over each other": (
                "kStage + position.stage * kStageBytes;\n      ptx::mbarrier_wait(barriers.empty",
                "kStage + position.stage * kStageBytes / 2;\n      ptx::mbarrier_wait(barriers.empty",
            ),
            "no panel for the first tile": (
                "number == share.first || share.nth_panel(number) > share.nth_panel(number - 1)",
                "share.nth_panel(number) > share.nth_panel(number - 1)",
            ),
            "one panel for all tiles": (
                "number == share.first || share.nth_panel(number) > share.nth_panel(number - 1)",
                "number == share.first",
            ),
            "the ring's phase does not flip": ("      parity ^= 1;\n", ""),
            "the ring is a stage too long": ("if (++stage == kStages)", "if (++stage == kStages + 1)"),
            # The consumers' products.
            "no wait for a full stage": (
                "      ptx::mbarrier_wait(barriers.full(position.stage), position.parity);\n",
                "",
            ),
            "phase of a full stage": (
                "barriers.full(position.stage), position.parity",
                "barriers.full(position.stage), position.parity ^ 1",
            ),
            "no fence of the registers": ("      ptx::wgmma_fence();\n", ""),
            "no commit": ("      ptx::wgmma_commit();\n", ""),
            "no wait before a release": ("        ptx::wgmma_wait<kInFlight>();\n", ""),
            "a wait that leaves one too many": ("wgmma_wait<kInFlight>()", "wgmma_wait<kInFlight + 1>()"),
            "a stage too early is released": (
                "if (step * kParts + part >= kInFlight) {",
                "if (step * kParts + part + 1 >= kInFlight) {",
            ),
            "another stage is released": (RELEASE, RELEASE.replace("read.stage", "position.stage")),
            "a stage is not released": (RELEASE, ""),
            "a warp releases": (RELEASE, RELEASE.replace("thread == 0", "thread < 32")),
            "the last stages are not released": (
                "    if (thread == 0) ptx::mbarrier_arrive(barriers.empty(read.stage));\n    read.advance();\n  }\n}",
                "    read.advance();\n  }\n}",
            ),
            "no wait for the last products": ("  ptx::wgmma_wait<0>();\n", ""),
            "a wait for all but the last products": ("  ptx::wgmma_wait<0>();\n", "  ptx::wgmma_wait<1>();\n"),
            "the descriptor's step": ("b + k * 2, step", "b + k * 4, step"),
            "sums begin anew at every stage": ("step > 0 || k > 0", "k > 0"),
            "a fence of the registers after their first product": (
                "      ptx::wgmma_fence();\n#pragma unroll\n      for (int k = 0; k < kDepth / 16; ++k) {",
                "#pragma unroll\n      for (int k = 0; k < kDepth / 16; ++k) {\n if (k > 0) ptx::wgmma_fence();\n",
            ),
            "a commit without the last product": (
                "step > 0 || k > 0);\n      }\n      ptx::wgmma_commit();\n",
                "step > 0 || k > 0);\n        if (k == 2) ptx::wgmma_commit();\n      }\n",
            ),
            # Turns and panels.
            "no first turn": ("    if (consumer == 1) ptx::barrier_arrive(kTurn, 2 * kWarpgroup);\n", ""),
            "no wait for a turn": ("    ptx::barrier_sync(kTurn + consumer, 2 * kWarpgroup);\n", ""),
            "a turn for oneself": ("barrier_arrive(kTurn + 1 - consumer", "barrier_arrive(kTurn + consumer"),
            "the turn is never passed on": ("  pass_on();\n  ptx::wgmma_wait", "  ptx::wgmma_wait"),
            "a turn after the last": ("if (consumer == 0 || round + 1 < rounds)", "if (true)"),
            "no wait for a full panel": ("    ptx::mbarrier_wait(barriers.panel_full(), panel & 1);\n", ""),
            "phase of a full panel": ("barriers.panel_full(), panel & 1", "barriers.panel_full(), (panel & 1) ^ 1"),
            "a panel is left before its products": (
                "    epilogue.prepare(tile);\n",
                "    epilogue.prepare(tile);\n    leave_panels(next_panel);\n",
            ),
            "a panel is never left": ("    leave_panels(next_panel);\n", ""),
            "a panel is left with a tile to go": (
                "next_panel = nth_panel(number + 2)",
                "next_panel = nth_panel(number + 3)",
            ),
            "a skipped panel is not left": ("    leave_panels(nth_panel(share.first + consumer));\n", ""),
            "a consumer begins at the other's stages": (
                "Position((number - share.first) * kSteps * kParts)",
                "Position(2 * round * kSteps * kParts)",
            ),
        },
    ),
    *_mutants(
        "softmax_forward.cu",
        FORWARD,
        {
            "column sums are read too early": (
                "      ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n#pragma unroll\n      for (int warp",
                "#pragma unroll\n      for (int warp",
            ),
            "column sums go on": ("      clear();  // and", "      // and"),
            "consumers share a barrier": (
                "      ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n#pragma unroll\n      for (int warp",
                "      ptx::barrier_sync(kOwn, kWarpgroup);\n#pragma unroll\n      for (int warp",
            ),
            "warps share their sums": ("4 * (lane.warp * kColumns + lane.column", "4 * (lane.column"),
            "a shuffle is missing": ("      sum += ptx::shuffle_xor(sum, 2);\n", ""),
            "rows beyond the end count": ("row_offset(i) >= row_left || ", ""),
            "columns beyond the end count": (" || column_offset(j) >= column_left", ""),
        },
    ),
    *_mutants(
        "softmax_backward.cu",
        BACKWARD,
        {
            "no wait for the box before": (
                "    if (lane.thread == 0) ptx::tma_store_wait_read<0>();\n    ptx::barrier",
                "    ptx::barrier",
            ),
            "no sync after the wait for the box": (
                "ptx::tma_store_wait_read<0>();\n    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n",
                "ptx::tma_store_wait_read<0>();\n",
            ),
            "a wait that leaves the box": (
                "    if (lane.thread == 0) ptx::tma_store_wait_read<0>();\n    ptx::barrier",
                "    if (lane.thread == 0) ptx::tma_store_wait_read<1>();\n    ptx::barrier",
            ),
            "no proxy fence": ("    ptx::fence_proxy_async();\n", ""),
            "the proxy fence after the sync": (
                "    ptx::fence_proxy_async();\n    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n",
                "    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n    ptx::fence_proxy_async();\n",
            ),
            "no sync before the box leaves": (
                "    ptx::fence_proxy_async();\n    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n",
                "    ptx::fence_proxy_async();\n",
            ),
            "no commit of the store": ("      ptx::tma_store_commit();\n", ""),
            "no wait for the last box": (
                "  DEVICE void end() {\n    if (lane.thread == 0) ptx::tma_store_wait_read<0>();",
                "  DEVICE void end() {",
            ),
            "a box is not swizzled": ("(chunk ^ row % 8) * 16", "chunk * 16"),
            "consumers share a box": ("const u32 box = memory;", "const u32 box = memory - consumer * kBytes;"),
            "vectors are read too early": (
                "    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n  }\n\n  DEVICE void find",
                "  }\n\n  DEVICE void find",
            ),
            "vectors of the first panel": ("if (tile.local_column != panel)", "if (panel < 0)"),
            "flags of one lane": ("    in_range = ptx::all_of_warp(in_range);\n", ""),
            "flags of rows alone": (
                "      in_range &= flag_in_range(in.outputs[of].columns, tile.column, share.column_end, kColumns);\n",
                "",
            ),
        },
    ),
    *_mutants(
        "softmax_backward.cu",
        MIRRORED,
        {
            "the mirror is stored where it is added": ("ptx::tma_add(*in.g[kOutput]", "ptx::tma_store(*in.g[kOutput]"),
            "the mirror is not transposed": ("ptx::stmatrix_transposed(address", "ptx::stmatrix(address"),
            "the mirror's rows are the tile's": (
                "const int row = kTransposed ? along_columns : along_rows",
                "const int row = along_rows",
            ),
            "a warp's own positives of the mirror": (
                "mirror_positive = !ptx::all_of_warp(!any);",
                "mirror_positive = any;",
            ),
        },
    ),
    *_mutants("tiles.cuh", PAIR, TILES),
    *_mutants("softmax_forward_pair.cu", PAIR, SUMS),
    *_mutants("softmax_forward_pair.cu", PAIR_MIRRORED, MIRROR),
]
