// The size of this machine's last-level cache.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdint>

namespace scse {

// Bytes of the largest cache that the processor lists; 0 if it lists none. (The C library's answer
// may be the sum of all caches of a socket.)
inline int64_t last_level_cache() {
  int64_t largest = 0;
#if defined(__x86_64__)
  for (const unsigned leaf : {0x4u, 0x8000001du}) {  // Intel's; the same list under AMD's number
    unsigned a, b, c, d;
    for (unsigned i = 0; __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 0x1f) != 0; ++i) {
      const int64_t line = (b & 0xfff) + 1, partitions = (b >> 12 & 0x3ff) + 1;
      const int64_t ways = (b >> 22) + 1, sets = int64_t{c} + 1;
      largest = std::max(largest, line * partitions * ways * sets);
    }
  }
#endif
  return largest;
}

}  // namespace scse
