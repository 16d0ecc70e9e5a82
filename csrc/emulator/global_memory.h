// Finds races through global memory: data that a thread loads, or overwrites, although nothing
// orders it after the thread that stored it in the same launch.
//
// Within a block that takes a barrier. Between blocks it takes what a kernel does whose last block
// combines the results of all: after the store, __threadfence (by the same thread, or by any after
// a barrier), then an atomic operation (likewise); and in the block that comes later an atomic
// operation, then a barrier (or the same thread). Loads that should have come before a store of
// another thread are not looked for.
#pragma once

#include "emulator/emulator.h"

namespace resnet_fused::emulator {

// To be called before the first block of a launch, and before each block with its linear index.
void forget_global_stores(unsigned threads_per_block);
void enter_block(uint64_t block);

struct GlobalRace {
  const char* what;
  const void* address;
  Site site;
  uint64_t block_before;
  unsigned thread_before;
  Site site_before;
  const char* why;
};

// Defined by the scheduler.
[[noreturn]] void fail_global_race(const GlobalRace& race);

}  // namespace resnet_fused::emulator
