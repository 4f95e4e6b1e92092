// The threads that PyTorch computes with, borrowed: OpenMP keeps them awake for a while after each use, where to start
// a thread takes up to 0.2 ms, and a second pool beside it would fight with it for the same cores.
#pragma once

#include <functional>

namespace softclip {

// Whether to borrow them where they can be had; true at first.
void borrow_threads(bool allowed);
// Whether they can be: an OpenMP is loaded that PyTorch's operators use as well, this process is not a fork, which its
// threads do not survive, and nobody has lately kept them from the cores.
bool can_borrow_threads();
// Calls body(0) .. body(threads - 1), which throw nothing, concurrently; body(0) on the calling thread. False where so
// many are not to be had: then nothing has been called.
bool run_on_borrowed_threads(int threads, const std::function<void(int)>& body);

}  // namespace softclip
