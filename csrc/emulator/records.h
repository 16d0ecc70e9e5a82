// What the emulator tells about the launches it has run, and what it can be told.
#pragma once

#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace resnet_fused::emulator {

struct LaunchRecord {
  std::string kernel;
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  Counters counters;
};

// Of the launches since the last call, without those that failed.
std::vector<LaunchRecord> take_records();

// The next launch runs in the order drawn from `seed`, each later one from a seed one higher.
void configure(uint64_t seed, int multiprocessors);

}  // namespace resnet_fused::emulator
