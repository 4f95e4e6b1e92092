// Threads as fibres of one thread, and time: the seed says who runs next and when what is asynchronous happens.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <sys/mman.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  va_list values, again;
  va_start(values, format);
  va_copy(again, values);
  std::string line(static_cast<std::size_t>(std::vsnprintf(nullptr, 0, format, values)), '\0');
  std::vsnprintf(line.data(), line.size() + 1, format, again);
  va_end(values);
  va_end(again);
  return line;
}

template <class... Values>
[[noreturn]] __attribute__((noinline, cold)) void fail(const char* format, Values... values) {
  throw Error(text(format, values...));
}
[[noreturn]] __attribute__((noinline, cold)) inline void fail(const char* message) { throw Error(message); }

class Random {  // splitmix64
 public:
  explicit Random(u64 seed) : state_(seed * 0xD1342543DE82EF95ull + 1) {}
  u64 next() {
    u64 z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
  u32 below(u32 n) { return static_cast<u32>((next() >> 32) * n >> 32); }
  bool chance(double probability) { return static_cast<double>(next() >> 11) * 0x1p-53 < probability; }

 private:
  u64 state_;
};

enum Kind { kLoad, kStore, kProduct, kKinds };

// How time runs under one seed. Uniform chances alone would let everything advance at about the same rate, and a race
// that needs one side to be far behind would never be lost. So the rates are drawn, too, from "at once" to "only when
// nothing else can happen".
struct Policy {
  explicit Policy(Random& random) {
    const double rates[] = {0, 0.002, 0.05, 0.5, 1};
    for (double& rate : happens) rate = rates[random.below(5)];
    stalls = random.chance(0.5) ? 0 : 0.2;
    ranked = random.chance(0.5);
    reorders = ranked ? 0.001 : 0;
    const double stay[] = {0, 0.9, 0.99};
    stays = stay[random.below(3)];
    const double preempt[] = {0.02, 0.2, 1};
    preempts = preempt[random.below(3)];
    const double leak[] = {0, 0, 0.5, 1};
    leaks = leak[random.below(4)];
  }
  double happens[kKinds];  // at a step of a thread, so likely is one of this kind
  double stalls;           // and so many of them wait until nothing else can happen
  bool ranked;             // the first warp of an order runs as long as it can, and
  double reorders;         // sometimes the order is drawn again
  double stays, preempts;  // with the warp that ran last; at a call that could go on
  double leaks;            // so many ordinary writes are seen by the copy engine before any fence
};

struct Warp;

struct Fibre {
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  Warp* warp = nullptr;
  u32 lane = 0;
  bool finished = false;
  const char* state = "runs";  // for reports, with two numbers
  u32 detail[2] = {};
};

struct Warp {
  Fibre* lanes[32] = {};
  u32 present = 0, runnable = 0;  // lanes
  u32 met = 0;                    // lanes that came to `meeting`
  const char* meeting = nullptr;
  u32 number = 0, rank = 0;
  u64 note = 0;  // what the lane that came last leaves to all
};

using Waiting = std::vector<Fibre*>;

// What happens without a thread: the operations of one kind that are under way.
struct Source {
  virtual bool pending() const = 0;
  // Lets one of them, or a part of it, happen. Unless forced, those that stall do not.
  virtual void advance(Random& random, bool forced) = 0;
  virtual ~Source() = default;
};

// Operations in no order.
template <class Operation>
class Pending {
 public:
  bool empty() const { return all_.empty(); }
  std::vector<Operation>& all() { return all_; }
  const std::vector<Operation>& all() const { return all_; }
  void add(Operation operation) { all_.push_back(std::move(operation)); }
  Operation* choose(Random& random, bool forced) {
    for (int attempt = 0;; ++attempt) {
      Operation& found = all_[random.below(static_cast<u32>(all_.size()))];
      if (!found.stalls || (forced && attempt > 3)) return &found;
      if (!forced) return nullptr;
    }
  }
  void remove(Operation* operation) {
    if (operation != &all_.back()) *operation = std::move(all_.back());
    all_.pop_back();
  }

 private:
  std::vector<Operation> all_;
};

#if defined(__x86_64__)
// Saves what a call preserves and the stack pointer, and takes those of another.
__attribute__((naked, noinline, noipa)) static void switch_context(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

class Scheduler {
 public:
  Scheduler(u64 seed, u32 warps, std::function<void()> body) : random(seed), policy(random), body_(std::move(body)) {
    warps_.reserve(warps);
  }

  Random random;
  Policy policy;
  Fibre* self = nullptr;
  Source* sources[kKinds] = {};
  std::function<void(Fibre&)> finished;
  u64 steps = 0;

  void add(Warp& warp) {
    warp.number = static_cast<u32>(warps_.size());
    warps_.push_back(&warp);
    for (u32 lane = 0; lane < 32; ++lane) {
      if (Fibre* fibre = warp.lanes[lane]) {
        fibre->warp = &warp;
        fibre->lane = lane;
        prepare(*fibre, alive_++);
        warp.present |= 1u << lane;
      }
    }
    warp.runnable = warp.present;
    runnable_ |= 1ull << warp.number;
  }

  // Until every fibre has ended. Returns false if nothing can happen any more.
  bool run() {
    current() = this;
    rank();
    while (alive_ > 0) {
      ++steps;
      if (Source* source = due()) {
        self = nullptr;
        source->advance(random, runnable_ == 0);
        continue;
      }
      if (runnable_ == 0) {
        self = nullptr;
        return false;
      }
      resume(choose());
      if (failed_) throw Error(message_);
    }
    return true;
  }

  // For a fibre, of itself: lets others run.
  void preempt() {
    if (random.chance(policy.preempts)) leave();
  }
  void sleep(const char* state, u32 first = 0, u32 second = 0) {
    self->state = state, self->detail[0] = first, self->detail[1] = second;
    Warp& warp = *self->warp;
    warp.runnable &= ~(1u << self->lane);
    if (warp.runnable == 0) runnable_ &= ~(1ull << warp.number);
    leave();
    self->state = "runs";
  }
  void wake(Fibre& fibre) {
    if (fibre.finished) return;
    fibre.warp->runnable |= 1u << fibre.lane;
    runnable_ |= 1ull << fibre.warp->number;
  }
  void wake(Waiting& waiting) {
    for (Fibre* fibre : waiting) wake(*fibre);
    waiting.clear();
  }
  template <class Condition>
  void until(Waiting& waiting, const Condition& condition, const char* state, u32 first = 0, u32 second = 0) {
    while (!condition()) {
      waiting.push_back(self);
      sleep(state, first, second);
    }
  }

  // What all lanes of a warp do at once: the last one to come does it for all.
  template <class Action>
  void together(const char* name, const Action& action) {
    Warp& warp = *self->warp;
    if (warp.present != 0xFFFFFFFF) fail("%s: lanes of the warp have ended", name);
    if (warp.met != 0 && warp.meeting != name) fail("%s: lanes of the warp are in %s", name, warp.meeting);
    warp.meeting = name;
    warp.met |= 1u << self->lane;
    if (warp.met != 0xFFFFFFFF) return sleep(name);
    warp.met = 0;
    action(warp);
    warp.runnable = 0xFFFFFFFF;
    runnable_ |= 1ull << warp.number;
    preempt();
  }

  const std::vector<Warp*>& warps() const { return warps_; }

 private:
  static constexpr std::size_t kStack = 128 << 10;

  static Scheduler*& current() {
    static Scheduler* scheduler = nullptr;
    return scheduler;
  }

  // Stacks are one piece of memory, kept for the next launch. Their tops differ in the lower bits, so that they share
  // no sets of the caches.
  u8* stack_end(u32 index) const {
    static u8* stacks = nullptr;
    static std::size_t bytes = 0;
    if (bytes < warps_.capacity() * 32 * kStack) {
      if (stacks != nullptr) munmap(stacks, bytes);
      bytes = warps_.capacity() * 32 * kStack;
      void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (found == MAP_FAILED) fail("no memory for %zu bytes of stacks", bytes);
      stacks = static_cast<u8*>(found);
    }
    return stacks + (index + 1) * kStack - index % 37 * 832;
  }

  static void enter() {
    Scheduler& scheduler = *current();
    try {
      scheduler.body_();
      Fibre& self = *scheduler.self;
      Warp& warp = *self.warp;
      if (warp.met != 0) fail("a lane ends while others of its warp are in %s", warp.meeting);
      self.finished = true, self.state = "has ended";
      warp.present &= ~(1u << self.lane);
      warp.runnable &= ~(1u << self.lane);
      if (warp.runnable == 0) scheduler.runnable_ &= ~(1ull << warp.number);
      --scheduler.alive_;
      scheduler.finished(self);
    } catch (const std::exception& error) {
      scheduler.failed_ = true;
      scheduler.message_ = error.what();
    }
    scheduler.leave();
    __builtin_unreachable();
  }

#if defined(__x86_64__)
  void prepare(Fibre& fibre, u32 index) {
    void** top = reinterpret_cast<void**>(stack_end(index)) - 8;  // 6 registers, where to begin, nowhere to return to
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(&enter);
    fibre.context = top;
  }
  void resume(Fibre& fibre) {
    self = &fibre;
    switch_context(&main_, fibre.context);
  }
  void leave() { switch_context(&self->context, main_); }
  void* main_ = nullptr;
#else
  void prepare(Fibre& fibre, u32 index) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stack_end(index) - (kStack / 2);
    fibre.context.uc_stack.ss_size = kStack / 2;
    makecontext(&fibre.context, &enter, 0);
  }
  void resume(Fibre& fibre) {
    self = &fibre;
    swapcontext(&main_, &fibre.context);
  }
  void leave() { swapcontext(&self->context, &main_); }
  ucontext_t main_;
#endif

  Source* due() {
    const u32 first = random.below(kKinds);
    if (runnable_ != 0) {
      Source* source = sources[first];
      return source->pending() && random.chance(policy.happens[first]) ? source : nullptr;
    }
    for (u32 i = 0; i < kKinds; ++i) {
      Source* source = sources[(first + i) % kKinds];
      if (source->pending()) return source;
    }
    return nullptr;
  }

  void rank() {
    for (Warp* warp : warps_) warp->rank = static_cast<u32>(random.next());
  }

  Fibre& choose() {
    if (random.chance(policy.reorders)) rank();
    if (last_ == nullptr || last_->runnable == 0 || !random.chance(policy.stays)) {
      last_ = nullptr;
      if (policy.ranked) {
        for (u64 left = runnable_; left != 0; left &= left - 1) {
          Warp* warp = warps_[__builtin_ctzll(left)];
          if (last_ == nullptr || warp->rank < last_->rank) last_ = warp;
        }
      } else {
        u64 left = runnable_;
        for (u32 skip = random.below(__builtin_popcountll(left)); skip > 0; --skip) left &= left - 1;
        last_ = warps_[__builtin_ctzll(left)];
      }
    }
    const u32 turn = random.below(32);
    const u32 turned = last_->runnable >> turn | last_->runnable << (31 - turn) << 1;
    return *last_->lanes[(__builtin_ctz(turned) + turn) % 32];
  }

  const std::function<void()> body_;
  std::vector<Warp*> warps_;
  u64 runnable_ = 0;  // warps with a lane that is
  u32 alive_ = 0;
  Warp* last_ = nullptr;
  bool failed_ = false;
  std::string message_;
};

}  // namespace emulator
