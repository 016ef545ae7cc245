#include "blend.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace smol {

namespace {

// Above this a period would no longer be "kilobytes, at once"; data/blend.py keeps it below 2^16 slots.
constexpr std::int64_t kMaxPeriod = std::int64_t{1} << 24;

std::int64_t checked_period(const std::vector<std::int64_t>& numerators) {
  if (numerators.empty() || numerators.size() > std::numeric_limits<std::uint16_t>::max()) {
    throw std::invalid_argument("a blend has 1 to 65535 sources, got " + std::to_string(numerators.size()));
  }
  std::int64_t period = 0;
  for (std::int64_t numerator : numerators) {
    if (numerator < 0 || numerator > kMaxPeriod) {
      throw std::invalid_argument("blend numerators lie in 0.." + std::to_string(kMaxPeriod) + ", got " +
                                  std::to_string(numerator));
    }
    period += numerator;
  }
  if (period < 1 || period > kMaxPeriod) {
    throw std::invalid_argument("a blend's numerators add up to 1.." + std::to_string(kMaxPeriod) + ", got " +
                                std::to_string(period));
  }
  return period;
}

}  // namespace

// The chairman assignment problem (Tijdeman 1980), as scheduling: sample c (from 0) of a source with weight a/D may
// not come before slot floor(c*D/a) and must not come after slot ceil((c+1)*D/a) - 1. Any order that respects both
// keeps the count after n slots between floor(n*a/D) and ceil(n*a/D), that is, within 1 of weight x n. Tijdeman proved
// that such an order exists for all weights that sum to 1, and for unit jobs on one machine "earliest deadline first
// among those that may come" finds an order whenever there is one. So the deadline test below can never fail; the
// greedy largest-error order that others use has no such guarantee.
Period build_period(const std::vector<std::int64_t>& numerators) {
  const std::int64_t period = checked_period(numerators);
  const auto sources = static_cast<std::int32_t>(numerators.size());

  // Only the next sample of a source ever waits: it is either in the list of the slot from which it may come, or ready.
  std::vector<std::int32_t> first_waiting(period, -1), next_waiting(sources, -1), taken(sources, 0);
  const auto wait_for = [&](std::int64_t slot, std::int32_t source) {
    next_waiting[source] = first_waiting[slot];
    first_waiting[slot] = source;
  };
  for (std::int32_t s = 0; s < sources; ++s) {
    if (numerators[s] > 0) wait_for(0, s);
  }

  using Job = std::pair<std::int64_t, std::int32_t>;  // deadline, source: ties go to the lower index
  std::priority_queue<Job, std::vector<Job>, std::greater<>> ready;
  Period out;
  out.source.reserve(period);
  out.ordinal.reserve(period);
  for (std::int64_t slot = 0; slot < period; ++slot) {
    for (std::int32_t s = first_waiting[slot]; s >= 0; s = next_waiting[s]) {
      const std::int64_t a = numerators[s];
      ready.emplace(((taken[s] + std::int64_t{1}) * period + a - 1) / a - 1, s);
    }
    if (ready.empty() || ready.top().first < slot) throw std::logic_error("blend: a sample missed its deadline");
    const std::int32_t s = ready.top().second;
    ready.pop();
    out.source.push_back(static_cast<std::uint16_t>(s));
    out.ordinal.push_back(taken[s]);
    if (++taken[s] < numerators[s]) wait_for(std::max(slot + 1, taken[s] * period / numerators[s]), s);
  }
  return out;
}

void build_blending_indices(const std::vector<double>& weights, std::int64_t size, std::int16_t* source,
                            std::int64_t* ordinal) {
  // int16 ids, and the ties, the max(i, 1) and the double arithmetic below, are all megatron-core's.
  if (weights.empty() || weights.size() > static_cast<std::size_t>(std::numeric_limits<std::int16_t>::max())) {
    throw std::invalid_argument("build_blending_indices takes 1 to 32767 weights, got " +
                                std::to_string(weights.size()));
  }
  std::vector<std::int64_t> taken(weights.size(), 0);
  for (std::int64_t i = 0; i < size; ++i) {
    const double position = std::max(static_cast<double>(i), 1.0);
    std::size_t best = 0;
    double best_error = weights[0] * position - static_cast<double>(taken[0]);
    for (std::size_t s = 1; s < weights.size(); ++s) {
      const double error = weights[s] * position - static_cast<double>(taken[s]);
      if (error > best_error) {
        best_error = error;
        best = s;
      }
    }
    source[i] = static_cast<std::int16_t>(best);
    ordinal[i] = taken[best]++;
  }
}

}  // namespace smol
