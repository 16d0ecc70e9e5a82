#include "emulator/global_memory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace resnet_fused::emulator {
namespace {

constexpr uintptr_t kLineBytes = 16;

// The bytes of one 16-byte line that one thread has stored at one time.
struct Store {
  uintptr_t line = 0;
  uint64_t block = 0;
  Site site;
  uint32_t mask = 0;
  uint32_t clock = 0;
  uint32_t phase = 0;  // 0, or of an earlier launch: the slot is free
  uint32_t warp_phase = 0;
  unsigned thread = 0;
};

struct Fence {
  uint32_t clock = 0;
  uint32_t phase = 0;
};

// What a thread of the running block has done. Whatever is of an earlier block has a lower phase.
struct ThreadHistory {
  Fence last_fence;
  Fence last_fence_of_earlier_phase;
  uint32_t atomic_phase = 0;
};

// Which stores of a block others can rely on, once they have seen its atomic operation.
struct Published {
  std::vector<uint32_t> before_clock;  // by thread: its stores before that time
  uint32_t before_phase = 0;           // of all threads: the stores before that phase
};

// Bytes of global memory, counted once however often they are added.
class DistinctBytes {
 public:
  void clear() {
    pages_.clear();
    last_ = nullptr;
  }

  // How many of them are new. An access is aligned to its size, so it stays within a word.
  int add(const void* p, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    const uintptr_t page = address / kPageBytes;
    if (last_ == nullptr || page != last_page_) {
      last_page_ = page;
      last_ = &pages_[page];
    }
    uint64_t& word = (*last_)[address % kPageBytes / 64];
    const uint64_t added = ((uint64_t{1} << bytes) - 1) << (address % 64) & ~word;
    word |= added;
    return std::popcount(added);
  }

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  using Page = std::array<uint64_t, kPageBytes / 64>;

  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_page_ = 0;
  Page* last_ = nullptr;
};

class GlobalMemory {
 public:
  void begin_launch(unsigned threads) {
    first_phase_of_launch_ = phase + 1;
    clock_ = 0;
    used_ = 0;
    first_line_ = UINTPTR_MAX;
    last_line_ = 0;
    threads_.assign(threads, {});
    published_.clear();
    read_.clear();
    written_.clear();
  }

  void begin_block(uint64_t block) {
    block_ = block;
    first_atomic_phase_ = UINT32_MAX;
  }

  void fence() {
    ThreadHistory& thread = threads_[current_thread];
    if (thread.last_fence.phase < phase) thread.last_fence_of_earlier_phase = thread.last_fence;
    thread.last_fence = {++clock_, phase};
  }

  void atomic() {
    first_atomic_phase_ = std::min(first_atomic_phase_, phase);
    threads_[current_thread].atomic_phase = phase;
    Published& published = published_[block_];
    published.before_clock.resize(threads_.size());
    for (unsigned t = 0; t < threads_.size(); ++t) {
      const ThreadHistory& thread = threads_[t];
      const bool is_before = t == current_thread || thread.last_fence.phase < phase;
      const Fence& fence = is_before ? thread.last_fence : thread.last_fence_of_earlier_phase;
      if (fence.phase < first_phase_of_block) continue;
      published.before_clock[t] = std::max(published.before_clock[t], fence.clock);
      published.before_phase = std::max(published.before_phase, fence.phase);
    }
  }

  void load(const void* p, size_t bytes, Site site) {
    counters.distinct_bytes_read += read_.add(p, bytes);
    const uintptr_t line = line_of(p);
    // Mostly what is read and what is written lie apart.
    if (line < first_line_ || line > last_line_) return;
    const uint32_t mask = mask_of(p, bytes);
    for (size_t i = first_slot(line); is_used(slots_[i]); i = next_slot(i)) {
      if (slots_[i].line == line && (slots_[i].mask & mask)) check(slots_[i], "reads", p, site);
    }
  }

  void store(const void* p, size_t bytes, Site site) {
    counters.distinct_bytes_written += written_.add(p, bytes);
    if (2 * (used_ + 1) > slots_.size()) grow();
    const uintptr_t line = line_of(p);
    const uint32_t mask = mask_of(p, bytes);
    first_line_ = std::min(first_line_, line);
    last_line_ = std::max(last_line_, line);
    Store* slot = nullptr;
    size_t i = first_slot(line);
    for (; is_used(slots_[i]); i = next_slot(i)) {
      Store& before = slots_[i];
      if (before.line != line) continue;
      if (before.mask & mask) {
        check(before, "writes", p, site);
        before.mask &= ~mask;
      }
      if (before.mask == 0) slot = &before;
    }
    if (slot == nullptr) {
      slot = &slots_[i];
      ++used_;
    }
    *slot = {line,          block_, site, mask, clock_, phase, warp_phases[warp_of(current_thread)],
             current_thread};
  }

 private:
  static uintptr_t line_of(const void* p) { return reinterpret_cast<uintptr_t>(p) / kLineBytes; }

  static uint32_t mask_of(const void* p, size_t bytes) {
    return ((1u << bytes) - 1) << (reinterpret_cast<uintptr_t>(p) % kLineBytes);
  }

  bool is_used(const Store& store) const { return store.phase >= first_phase_of_launch_; }

  size_t first_slot(uintptr_t line) const {
    return (line * 0x9e3779b97f4a7c15 >> 32) & (slots_.size() - 1);
  }

  size_t next_slot(size_t i) const { return (i + 1) & (slots_.size() - 1); }

  void grow() {
    std::vector<Store> old(std::max<size_t>(1024, 2 * slots_.size()));
    old.swap(slots_);
    for (const Store& store : old) {
      if (!is_used(store)) continue;
      size_t i = first_slot(store.line);
      while (is_used(slots_[i])) i = next_slot(i);
      slots_[i] = store;
    }
  }

  void check(const Store& before, const char* what, const void* p, Site site) const {
    const char* why = nullptr;
    if (before.block == block_) {
      if (is_unordered({before.site, before.phase, before.warp_phase, before.thread})) {
        why = "with no barrier between";
      }
    } else if (!is_published(before)) {
      why = "without __threadfence and an atomic operation after it";
    } else if (first_atomic_phase_ >= phase &&
               threads_[current_thread].atomic_phase < first_phase_of_block) {
      why = "with no atomic operation between by which this block could know";
    }
    if (why != nullptr) {
      fail_global_race({what, p, site, before.block, before.thread, before.site, why});
    }
  }

  bool is_published(const Store& store) const {
    const auto published = published_.find(store.block);
    return published != published_.end() &&
           (store.clock < published->second.before_clock[store.thread] ||
            store.phase < published->second.before_phase);
  }

  std::vector<Store> slots_;  // a hash table by line, with linear probing; its size a power of two
  size_t used_ = 0;
  uintptr_t first_line_ = UINTPTR_MAX;  // of those in the table
  uintptr_t last_line_ = 0;
  std::vector<ThreadHistory> threads_;
  std::unordered_map<uint64_t, Published> published_;  // by block
  uint64_t block_ = 0;
  uint32_t first_phase_of_launch_ = 0;
  uint32_t first_atomic_phase_ = UINT32_MAX;
  uint32_t clock_ = 0;  // advances with every fence
  DistinctBytes read_, written_;
};

GlobalMemory global_memory;

}  // namespace

void forget_global_stores(unsigned threads_per_block) {
  global_memory.begin_launch(threads_per_block);
}

void enter_block(uint64_t block) { global_memory.begin_block(block); }

void on_load(const void* p, size_t bytes, Site site) { global_memory.load(p, bytes, site); }

void on_store(const void* p, size_t bytes, Site site) { global_memory.store(p, bytes, site); }

void on_fence() { global_memory.fence(); }

void on_atomic() { global_memory.atomic(); }

}  // namespace resnet_fused::emulator
