// Which window of a source is read at which position: keyed permutations, nothing stored. Pure C++.
#pragma once

#include <cstdint>
#include <vector>

namespace smol {

// A bijection on [0, size), chosen by `key`, evaluated at any point in O(1) time and memory. size is 1 to 2^62.
class KeyedPermutation {
 public:
  KeyedPermutation(std::uint64_t size, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t index) const;
  std::uint64_t inverse(std::uint64_t image) const;

 private:
  static constexpr int kMaxRounds = 24;
  std::uint64_t size_;
  int right_bits_, rounds_;
  std::uint64_t left_mask_, right_mask_;
  std::uint64_t round_keys_[kMaxRounds];
};

// How one source is laid out at one sequence length (data/order.py explains pages and blocks).
struct Layout {
  std::int64_t pages;             // whole pages in an epoch
  std::int64_t windows_per_page;  // page length / sequence length
  std::int64_t block_pages;       // pages whose windows are permuted together
  std::uint64_t key;              // of (seed, source name)
};

// For each i: the epoch and the window that position[i] of source[i] is. Throws std::invalid_argument.
void lookup_windows(const std::vector<Layout>& layouts, const std::uint16_t* source, const std::int64_t* position,
                    std::int64_t count, std::int64_t* epoch, std::int64_t* window);

// The inverse: for each i, the position at which window[i] of epoch[i] is read. Throws std::invalid_argument.
void locate_windows(const Layout& layout, const std::int64_t* epoch, const std::int64_t* window, std::int64_t count,
                    std::int64_t* position);

}  // namespace smol
