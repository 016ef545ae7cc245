// The order in which the sources of one stage take turns. Pure C++: bindings.cpp does the numpy side.
#pragma once

#include <cstdint>
#include <vector>

namespace smol {

// One period of a mixture: slot i of the period belongs to `source[i]`, as its `ordinal[i]`-th sample in the period.
struct Period {
  std::vector<std::uint16_t> source;
  std::vector<std::int32_t> ordinal;
};

// Source s has weight numerators[s] / sum(numerators); the period is as long as that sum. At every prefix of n slots
// the count of s is floor or ceil of weight x n. Throws std::invalid_argument.
Period build_period(const std::vector<std::int64_t>& numerators);

// megatron-core's greedy "largest error first" order, to the bit. Throws std::invalid_argument.
void build_blending_indices(const std::vector<double>& weights, std::int64_t size, std::int16_t* source,
                            std::int64_t* ordinal);

}  // namespace smol
