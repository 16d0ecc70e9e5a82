// The operator library of the emulated kernels, which register themselves in it, and two operators
// to look at the emulator and to set it up.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "common/checks.h"
#include "common/schemas.h"
#include "cuda/platform.h"
#include "emulator/records.h"

namespace resnet_fused::emulator {
namespace {

void write_extents(std::ostream& json, const dim3& extents) {
  json << "[" << extents.x << ", " << extents.y << ", " << extents.z << "]";
}

void write_record(std::ostream& json, const LaunchRecord& record) {
  const Counters& counters = record.counters;
  json << "{\"kernel\": \"" << record.kernel << "\", \"grid\": ";
  write_extents(json, record.grid);
  json << ", \"block\": ";
  write_extents(json, record.block);
  json << ", \"bytes_read\": " << counters.bytes_read
       << ", \"bytes_written\": " << counters.bytes_written
       << ", \"distinct_bytes_read\": " << counters.distinct_bytes_read
       << ", \"distinct_bytes_written\": " << counters.distinct_bytes_written
       << ", \"accesses\": {";
  const char* separator = "";
  for (size_t i = 0; i < counters.accesses.size(); ++i) {
    if (counters.accesses[i] == 0) continue;
    json << separator << "\"" << (1 << i) << "\": " << counters.accesses[i];
    separator = ", ";
  }
  json << "}, \"atomics\": " << counters.atomics << ", \"shared_bytes\": " << record.shared_bytes
       << ", \"barriers\": " << counters.barriers << ", \"products\": " << counters.products
       << ", \"bank_conflicts\": " << counters.bank_conflicts << "}";
}

// A JSON list of the launches since the last call.
std::string launches() {
  std::ostringstream json;
  json << "[";
  const char* separator = "";
  for (const LaunchRecord& record : take_records()) {
    json << separator;
    write_record(json, record);
    separator = ", ";
  }
  json << "]";
  return json.str();
}

void configure_operator(int64_t seed, int64_t multiprocessors) {
  RESNET_FUSED_CHECK(multiprocessors > 0 && multiprocessors <= INT32_MAX,
                     "configure: multiprocessors must be positive, got ", multiprocessors);
  configure(static_cast<uint64_t>(seed), static_cast<int>(multiprocessors));
}

}  // namespace
}  // namespace resnet_fused::emulator

STABLE_TORCH_LIBRARY(RESNET_FUSED_NAMESPACE, m) {
  for (const char* schema : resnet_fused::kKernelSchemas) m.def(schema);
  m.def("launches() -> str");
  m.def("configure(int seed, int multiprocessors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&resnet_fused::emulator::launches));
  m.impl("configure", TORCH_BOX(&resnet_fused::emulator::configure_operator));
}
