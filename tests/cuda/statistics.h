// What a launch did.
#pragma once

namespace emulator {

struct Statistics {  // what a warp does at once counts once
  unsigned long long loads, load_bytes, stores, products, stored_matrices, shuffles, votes, exponentials;
  unsigned long long shared_reads, shared_writes, mbarrier_arrivals, mbarrier_waits, named_barriers, block_barriers;
  unsigned long long proxy_fences, steps;
};
extern Statistics statistics;  // of the launch under way or the last one

}  // namespace emulator
