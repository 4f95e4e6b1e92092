// The way over all blocks of a plan: has the operands packed, multiplies, and hands the dots of one block after the
// other to an operation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "operations.h"
#include "panels.h"
#include "plan.h"
#include "workspace.h"

namespace softclip {

// The panels that a block's rows and columns are in, beside others.
struct Packed {
  const Panels &left, &right;
};

// What an operation does with the blocks of a plan. All threads call it, each with its own workspace.
class Visitor {
 public:
  virtual ~Visitor() = default;
  // Memory that the threads share, for as long as the call; `passing`: it goes back to the system afterwards.
  virtual size_t shared_bytes() const { return 0; }
  virtual void attach(char* /*shared*/, bool /*passing*/) {}
  // Before the thread's first block.
  virtual void start(int /*thread*/) {}
  // The block's dots are computed.
  virtual void block(Workspace& workspace, const Packed& packed, const Block& block) = 0;
  // These columns have met all row blocks of a group.
  virtual void columns_done(Workspace& /*workspace*/, int64_t /*column*/, int /*columns*/) {}
  // After the last block of all threads.
  virtual void finish(int /*thread*/) {}
};

// Takes the visitor to every block of the plan. False: cancelled.
bool traverse(const Plan& plan, const Poll& poll, Visitor& visitor);

}  // namespace softclip
