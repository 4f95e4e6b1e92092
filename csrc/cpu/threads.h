// How many threads a call has.
#pragma once

namespace softclip {

// The work is divided into shares, and the order of sums depends on their number: it follows from the problem and from
// PyTorch's threads alone. Where a thread of PyTorch's for each share is not to be had, our own take them, `own` at
// most, so many as it is worth to start: each of fewer takes several shares, and no bit changes.
struct Threads {
  int shares, own;
};

}  // namespace softclip
