#include "openmp.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>

namespace softclip {
namespace {

using Clock = std::chrono::steady_clock;

// What a compiler makes of `#pragma omp parallel`, as GCC's libgomp has it and LLVM's and Intel's copies of it. Looked
// up by name in what the process has loaded, with the outcome that the dynamic linker came to for PyTorch: to link a
// library of our own choice could give the process a second pool.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();
  int (*most_threads)();

  OpenMP() {
    find("GOMP_parallel", parallel);
    find("omp_get_thread_num", thread);
    find("omp_get_num_threads", threads);
    find("omp_get_max_threads", most_threads);
  }
  bool found() const { return parallel && thread && threads && most_threads; }

 private:
  template <class Function>
  static void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

// OpenMP's threads wait for milliseconds without sleeping. Where other processes want the cores as well, theirs and
// ours take them from each other that way. So once threads have come this late twice within a while, calls have threads
// of their own for another, which sleep. (One of OpenMP's that slept comes within 0.2 ms; one that is late once has met
// a passer-by, such as the host of a virtual machine.)
constexpr std::chrono::milliseconds kLate{1}, kAgain{200}, kAlone{1000};

std::atomic<bool> allowed{true}, forked{false};
std::atomic<Clock::time_point> last_late{Clock::time_point{}}, alone_until{Clock::time_point{}};

const OpenMP& openmp() {
  static const OpenMP found;
  static const int handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  static_cast<void>(handler);
  return found;
}

struct Region {
  const int threads;
  const std::function<void(int)>& body;
  const Clock::time_point start = Clock::now();
  std::atomic<bool> complete{false}, late{false};

  static void enter(void* data) {
    Region& region = *static_cast<Region*>(data);
    // Fewer come where the caller is in a parallel region itself, or the program has set a limit.
    if (openmp().threads() != region.threads) return;
    region.complete.store(true, std::memory_order_relaxed);
    if (Clock::now() - region.start > kLate) region.late.store(true, std::memory_order_relaxed);
    region.body(openmp().thread());
  }
};

}  // namespace

void borrow_threads(bool allow) { allowed.store(allow); }

bool can_borrow_threads() {
  return openmp().found() && allowed.load() && !forked.load() && Clock::now() >= alone_until.load();
}

bool run_on_borrowed_threads(int threads, const std::function<void(int)>& body) {
  if (!can_borrow_threads() || openmp().most_threads() < threads) return false;
  Region region{threads, body};
  openmp().parallel(Region::enter, &region, static_cast<unsigned>(threads), 0);
  if (region.late.load()) {
    const auto now = Clock::now();
    if (now - last_late.exchange(now) < kAgain) alone_until.store(now + kAlone);
  }
  return region.complete.load();
}

}  // namespace softclip
