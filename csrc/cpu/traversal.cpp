#include "traversal.h"

#include <algorithm>
#include <vector>

#include "memory.h"
#include "team.h"

namespace softclip {
namespace {

constexpr size_t kKeptBytes = 16 << 20;  // of workspaces, from one call to the next
constexpr size_t kApart = 4096;          // no two threads' memory in one page

constexpr int kPatch = 16;  // square patches of whole cache lines

// Of `size` rows and columns, `step` from row to row. Whole patches of columns are written, or all of the step, with
// zeros past the end: vectors are read across it.
void transpose(const float* from, float* to, int size, int64_t step) {
  for (int i = 0; i < size; i += kPatch) {
    for (int j = 0; j < size; j += kPatch) {
      for (int k = i; k < i + kPatch && k < size; ++k) {
        for (int m = j; m < j + kPatch && m < step; ++m) {
          to[k * step + m] = m < size ? from[m * step + k] : 0.0f;
        }
      }
    }
  }
}

// The way of one share of the work.
class Traversal {
 public:
  Traversal(const Plan& plan, SharedPanels& shared, Workspace& workspace, Visitor& visitor, Team& team, int share)
      : plan_(plan), shared_(shared), workspace_(workspace), visitor_(visitor), team_(team), share_(share) {}

  void start(Stopwatch& stopwatch) {
    workspace_.measure_by(stopwatch);
    visitor_.start(share_);
    stopwatch.lap(kPasses);
    shared_.pack(share_);  // what its jobs of the first round take; the others take it after that round
    stopwatch.lap(kPacking);
  }

  // kept_offsets: Plan's, or empty where nothing is kept.
  void round(int round, const std::vector<int64_t>& kept_offsets) {
    float* kept = nullptr;
    if (!kept_offsets.empty()) kept = plan_.kept.data + kept_offsets[round * plan_.threads.shares + share_];
    for (const Job& job : plan_.schedule.jobs(round, share_)) {
      work(job, kept);
      if (kept != nullptr) kept += plan_.kept_floats_above(job, job.row_end);
    }
  }

  void finish() { visitor_.finish(share_); }

 private:
  void work(const Job& job, float* kept) {
    const int64_t block = plan_.kernels.block, group = block * workspace_.group();
    for (int64_t first = job.row_begin; first < job.row_end; first += group) {
      const int64_t last = std::min(first + group, job.row_end);
      const Panels& left = shared_.used() ? shared_.left(job.row_group) : packed(workspace_.left(), {first, last});
      workspace_.stopwatch().lap(kPacking);
      for (int64_t column = job.first_column(first); column < job.column_end; column += block) {
        const int columns = size(column, job.column_end);
        const Panels& right =
            shared_.used() ? shared_.right(job.column_group) : packed(workspace_.right(), {column, column + columns});
        workspace_.stopwatch().lap(kPacking);
        for (int64_t row = first; row < last && !(job.triangle && row > column); row += block) {
          if (team_.stopped(share_)) return;  // share 0 is the calling thread's
          const bool diagonal = job.triangle && row == column;
          const Block visited{row, column, size(row, last), columns, plan_.mirrored && !diagonal};
          if (kept != nullptr) workspace_.use_kept(kept, plan_.kept_block(job, visited));
          visit({left, right}, visited);
        }
        visitor_.columns_done(workspace_, column, columns);
        workspace_.stopwatch().lap(kProducts);
      }
    }
  }

  int size(int64_t begin, int64_t end) const {
    return static_cast<int>(std::min<int64_t>(plan_.kernels.block, end - begin));
  }

  // A thread meets the same rows with other columns in every round, unless blocks are visited with their mirrors.
  static const Panels& packed(Panels& panels, const Range& rows) {
    panels.pack(rows);
    return panels;
  }

  void visit(const Packed& packed, const Block& block) const {
    if (plan_.multiplies()) multiply(packed, block);
    workspace_.stopwatch().lap(kProducts);
    visitor_.block(workspace_, packed, block);
  }

  void multiply(const Packed& packed, const Block& block) const {
    for (int side = 0; side < plan_.sides(); ++side) {
      for (size_t p = 0; p < plan_.products.size(); ++p) {
        if (side == kMirror && !block.with_mirror) {  // on the diagonal
          transpose(workspace_.dots(p, kDirect), workspace_.dots(p, kMirror), block.rows, workspace_.dots_step());
          continue;
        }
        const Product& product = plan_.products[p];
        plan_.product_kernels(product).multiply(packed.left.left(p, side, block.row),
                                                packed.right.right(p, side, block.column), product.summed, block.rows,
                                                block.columns, workspace_.dots(p, side), workspace_.dots_step());
      }
    }
  }

  const Plan& plan_;
  SharedPanels& shared_;
  Workspace& workspace_;
  Visitor& visitor_;
  Team& team_;
  const int share_;
};

}  // namespace

bool traverse(const Plan& plan, const Poll& poll, Visitor& visitor) {
  const int shares = plan.threads.shares;
  SharedPanels shared(plan);
  std::vector<Workspace> workspaces(shares, Workspace(plan, !shared.used()));
  const size_t each = (workspaces[0].bytes() + kApart - 1) / kApart * kApart;
  const Scratch scratch(each * workspaces.size() + shared.bytes() + visitor.shared_bytes(), kKeptBytes);
  char* memory = scratch.data();
  for (Workspace& workspace : workspaces) {
    workspace.attach(memory);
    memory += each;
  }
  shared.attach(memory);
  visitor.attach(memory + shared.bytes(), !scratch.kept());
  const std::vector<int64_t> kept_offsets = plan.kept.data == nullptr ? std::vector<int64_t>{} : plan.kept_offsets();
  Team team(plan.threads, poll);
  std::vector<Stopwatch> stopwatches(shares);  // of threads, which start later
  team.run([&](int thread) {
    const FlushDenormals flush;
    Stopwatch& stopwatch = stopwatches[thread];
    stopwatch.lap(kWaiting);
    std::vector<Traversal> own;
    for (int share = thread; share < shares; share += team.threads()) {
      own.emplace_back(plan, shared, workspaces[share], visitor, team, share);
      own.back().start(stopwatch);
    }
    for (int round = 0; round < plan.schedule.rounds(); ++round) {
      for (Traversal& traversal : own) traversal.round(round, kept_offsets);
      team.wait(thread);
      stopwatch.lap(kWaiting);
    }
    for (Traversal& traversal : own) {
      if (!team.cancelled()) traversal.finish();
    }
    stopwatch.lap(kPasses);
    stopwatch.hand_in();
  });
  return !team.cancelled();
}

}  // namespace softclip
