// What a plan looks at of a device. Plain C++.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace ldm_fused {

constexpr int kLargestCluster = 16;  // where there are clusters; above 8 it depends on the device's layout

struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes, for a kernel that asks for more than 48 KB
  int max_cluster;       // blocks of a cluster; 1: there are none
};

LDM_FUSED_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LDM_FUSED_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ldm_fused
