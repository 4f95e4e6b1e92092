// The positives, whose entries of G never pass through a low precision: near convergence they are differences of
// numbers close to 1.
#pragma once

#include <cstdint>

#include "plan.h"
#include "workspace.h"

namespace softclip {

// Calls found(row, at) for every row of the problem whose positive lies in the block, seen from a side: `at` is the
// positive's place in that side's dots or G, whichever has this step from one row to the next.
template <class Found>
void each_positive(const Plan& plan, const Block& block, int side, int64_t step, const Found& found) {
  const int64_t* positive_column = plan.problem.positive_column;
  if (positive_column == nullptr) return;
  const bool direct = side == kDirect;  // the mirror has the problem's rows as its columns
  const int64_t row = direct ? block.row : block.column, rows = direct ? block.rows : block.columns;
  const int64_t column = direct ? block.column : block.row, columns = direct ? block.columns : block.rows;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t j = positive_column[row + i] - column;
    if (j >= 0 && j < columns) found(row + i, direct ? i * step + j : j * step + i);
  }
}

// The loss's gradient with respect to the positive's logit of a row that each_positive found. The block's dots are
// those of the forward, bit for bit.
double positive_gradient(const Plan& plan, const Gradients& in, const Workspace& workspace, int side, int64_t row,
                         int64_t at);

}  // namespace softclip
