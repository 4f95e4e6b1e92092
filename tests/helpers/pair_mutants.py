"""The part of kernel_mutants.py that is of the forward kernel with a teacher: names, and texts before and after."""

from __future__ import annotations

OWN = "    ptx::barrier_sync(kOwn + consumer, kWarpgroup);"
POSITIVES_SYNC = OWN + "  // and the sums of the tile before have been read\n"
ROWS_SYNC = OWN + "\n    float total[kSums];\n"
PLACE = "    ptx::store_shared(memory + kPlaces + 4 * lane.thread, __int_as_float(place));\n"
FLAG = (
    "    if (lane.thread % 32 == 0) ptx::store_shared(memory + kPlaces + 4 * (kRows + lane.warp), "
    "none ? 0.0f : 1.0f);\n"
)

# Two products of a tile, in tiles.cuh.
TILES = {
    "the second product's panel is the first's": (
        "((kPair ? part : 0) * kSteps + step) * kPanelStep",
        "step * kPanelStep",
    ),
    "the second panel is loaded as the first": ("*operands.y[n / kSteps]", "*operands.y[0]"),
    "the panels are exchanged": ("*operands.y[n / kSteps]", "*operands.y[1 - n / kSteps]"),
    "the second stream is the first": ("*operands.x[kPair ? part : 0]", "*operands.x[0]"),
    "the streams are exchanged": ("*operands.x[kPair ? part : 0]", "*operands.x[1 - part]"),
    "panel and stage are exchanged": (
        "a = kPair ? panel : stage, b = kPair ? stage : panel",
        "a = stage, b = panel",
    ),
    "one panel's bytes are expected": (
        "kPanels * kSteps * kPanelStep);\n      for",
        "kSteps * kPanelStep);\n      for",
    ),
    "one panel's boxes are loaded": ("n < kPanels * kSteps; ++n", "n < kSteps; ++n"),
    "stages lie over the second panel": (
        "kStage = kPanel + kPanels * kSteps * kPanelStep",
        "kStage = kPanel + kSteps * kPanelStep",
    ),
    "stages of half the rows": ("kStageRows = kPair ? kRows : kRows / kParts", "kStageRows = kRows / kParts"),
    "the second product's rows are others": ("(kPair ? 0 : part * kStageRows)", "part * kStageRows / 2"),
    "no wait for an empty panel of two": (
        "      ptx::mbarrier_wait(barriers.panel_empty(), (share.nth_panel(number) & 1) ^ 1);\n",
        "",
    ),
    "two panels are left before their products": (
        "    epilogue.prepare(tile);\n",
        "    epilogue.prepare(tile);\n    leave_panels(next_panel);\n",
    ),
    "no wait for the last of two products": ("  ptx::wgmma_wait<0>();\n", ""),
}

# With or without a mirror.
SUMS = {
    "positives are read too early": (POSITIVES_SYNC, ""),
    "positives are written too late": (PLACE + FLAG + POSITIVES_SYNC, POSITIVES_SYNC + PLACE + FLAG),
    "a warp's flag is written too late": (FLAG + POSITIVES_SYNC, POSITIVES_SYNC + FLAG),
    "consumers share the positives' barrier": (POSITIVES_SYNC, OWN.replace("kOwn + consumer", "kOwn") + "\n"),
    "row sums are read too early": (ROWS_SYNC, ROWS_SYNC.replace(OWN + "\n", "")),
    "consumers share the row sums' barrier": (ROWS_SYNC, ROWS_SYNC.replace("kOwn + consumer", "kOwn")),
    "row sums wait for a turn": (
        "    ptx::barrier_sync(kOwn + consumer, kWarpgroup);\n    float total[kSums];\n",
        "    ptx::barrier_sync(kTurn + consumer, kWarpgroup);\n    float total[kSums];\n",
    ),
    "the first warp's flag says all": (
        "warp < 4; ++warp) any += ptx",
        "warp < 1; ++warp) any += ptx",
    ),
    "one flag for all warps": ("4 * (kRows + lane.warp)", "4 * kRows"),
    "each warp looks for its own positives": ("    if (any > 0.0f) {\n", "    if (!none) {\n"),
    "warps share their row sums": ("memory + lane.warp * kWarpSums + 4", "memory + 4"),
    "places lie over the sums": ("kPlaces = 4 * kWarpSums", "kPlaces = 3 * kWarpSums"),
    "flags lie beyond the memory": ("kPlaces + kRows * 4 + 16;", "kPlaces + kRows * 4;"),
    "consumers share their memory": ("        memory(memory),\n", "        memory(memory - consumer * kBytes),\n"),
    "the order of places": (
        "64 * (group / 4) + 32 * (group / 2 % 2) + 16 * (group % 2)",
        "64 * (group % 2) + 32 * (group / 2 % 2) + 16 * (group / 4)",
    ),
    "places of eight rows": ("+ 16 * (group % 2) + lane.column;", "+ 8 * (group % 2) + lane.column;"),
    "the order of the lanes": ("    halve<16, 16>(d, s);\n", "    halve<16, 4>(d, s);\n"),
    "a half is left out": ("    halve<4, 4>(d, s);\n", ""),
    "the half that is kept is sent": ("ptx::shuffle_xor(upper ? low : high", "ptx::shuffle_xor(upper ? high : low"),
    "a shuffle of the columns is missing": (
        "    return value + ptx::shuffle_xor(value, 2);\n",
        "    return value;\n",
    ),
    "column sums of two threads go on": (
        "        for (int s = 0; s < kSums; ++s) column[s][r] = 0.0f;\n",
        "",
    ),
    "every tile's slot has the sums so far": (
        "      if (last_of_panel) {\n#pragma unroll\n        for (int s = 0; s < kSums; ++s) {\n",
        "      if (true) {\n#pragma unroll\n        for (int s = 0; s < kSums; ++s) {\n",
    ),
    "rows beyond the end of a pair count": ("column_offset(n) >= row_left || ", ""),
    "columns beyond the end of a pair count": (" || 8 * r >= column_left", ""),
    "every tile is whole": ("      add<false>(d, tile);\n", "      add<true>(d, tile);\n"),
    "row slots of 128 columns": (
        "out.row_sums + static_cast<long long>(tile.local_column / kColumns)",
        "out.row_sums + static_cast<long long>(tile.local_column / kRows)",
    ),
    "the teacher's exponentials are the student's": (
        "of_row[2] = fmaf(e2, z1, of_row[2]);",
        "of_row[2] = fmaf(e1, z1, of_row[2]);",
    ),
    "the teacher's products": ("column[2][r] = fmaf(e2, z1", "column[2][r] = fmaf(e2, z2"),
    "the teacher's scale is the student's": ("[kMirror ? kFactor : kTeacherFactor]", "[kFactor]"),
}

DIAGONAL = "diagonal && tile.local_column / kRows * kRows == tile.local_row"
MIRROR = {
    # The share.
    "odd panels have a tile less": ("panel % 2 * (panel / 2 + 1); }", "panel % 2 * (panel / 2); }"),
    "panels have a tile less": ("return panel / 2 * (panel / 2 + 1) +", "return panel / 2 * (panel / 2) +"),
    "a panel begins a tile later": (
        "while (before(panel + 1) <= number) ++panel;",
        "while (before(panel + 1) < number) ++panel;",
    ),
    "a panel ends a tile earlier": (
        "while (before(panel + 1) <= number) ++panel;",
        "while (before(panel + 1) <= number + 1) ++panel;",
    ),
    "even panels alone": ("    while (before(panel + 1) <= number) ++panel;\n", ""),
    "the last panel is left out": ("tiles = before(panels());", "tiles = before(panels() - 1);"),
    "shares of the whole square": ("    if (diagonal) {\n      const long", "    if (false) {\n      const long"),
    "the whole square is visited": ("diagonal(kMirror && row_start == column_start)", "diagonal(false)"),
    "all super-blocks are on the diagonal": ("diagonal(kMirror && row_start == column_start)", "diagonal(kMirror)"),
    "panels count from the super-block's first": ("return panel(number) - panel(first); }", "return panel(number); }"),
    "the square on the diagonal comes last": ("of / 2 - (number - before(of))", "number - before(of)"),
    "no square is its own mirror": (DIAGONAL, "false"),
    "half of a square is its own mirror": (DIAGONAL, "diagonal && tile.local_column == tile.local_row"),
    "a square beside is its own mirror": (DIAGONAL, DIAGONAL.removeprefix("diagonal && ")),
    # Sums of the tile and of its mirror.
    "the mirror's sums are not exchanged": ("? 1 - statistic :", "? statistic :"),
    "the mirror's products are the tile's": (": kSums - 1; }", ": 2; }"),
    "the mirror's columns take the tile's sums": (
        "= total[mirrored(s)];",
        "= total[s];",
    ),
    "the mirror takes what has no mirror": (
        "          column[s][r] = 0.0f;\n        }\n",
        "        }\n",
    ),
    "the mirror takes products that have none": ("        column[kSums - 1][r] = 0.0f;\n", ""),
    "sums on the diagonal are lost": (
        "          if (kMirror && s < 2) total[s] += over_rows(on_diagonal[s % 2][r]);\n",
        "",
    ),
    "sums on the diagonal go on": ("        on_diagonal[0][r] = on_diagonal[1][r] = 0.0f;\n", ""),
    "the student's sums on the diagonal are both": ("on_diagonal[s % 2][r]);", "on_diagonal[0][r]);"),
    "the mirror's columns on the diagonal": ("if (kMirror && !own_mirror) mirror[", "if (kMirror) mirror["),
    "the mirror's rows on the diagonal": ("if (kMirror && !own_mirror) out.mirror", "if (kMirror) out.mirror"),
    "column sums are those on the diagonal": (
        "          total[s] = mirror[s];\n",
        "          total[s] = 0.0f;\n",
    ),
    # Positives.
    "the mirror's positives are the tile's products": (
        "] = product(d, 1, n, r) * out.scalars[kScale];",
        "] = product(d, 0, n, r) * out.scalars[kScale];",
    ),
    "the mirror has no positives": ("    if (kMirror && !own_mirror) {\n", "    if (false) {\n"),
    "positives of the mirror's columns": ("halves[2ll * own] : -1;", "halves[2ll * (own ^ 1)] : -1;"),
}
