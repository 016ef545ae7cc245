// Token ids spelled out as the bytes they stand for, for the search of data/find.py. Pure C++.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace smol {

// Token t stands for the bytes [starts[t], starts[t + 1]) of `spelling`; `tokens` of them.
struct Vocabulary {
  const char* spelling;
  const std::int64_t* starts;
  std::int64_t tokens;
};

// Bytes of all ids together. Throws std::invalid_argument for an id that the vocabulary does not have.
template <typename Id>
std::int64_t spelled_bytes(const Vocabulary& vocabulary, const Id* ids, std::int64_t count) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::int64_t>(ids[i]);
    if (id < 0 || id >= vocabulary.tokens) {
      throw std::invalid_argument("id " + std::to_string(id) + " is not in the vocabulary of " +
                                  std::to_string(vocabulary.tokens));
    }
    total += vocabulary.starts[id + 1] - vocabulary.starts[id];
  }
  return total;
}

// Writes them to `out`, which has room for spelled_bytes.
template <typename Id>
void spell(const Vocabulary& vocabulary, const Id* ids, std::int64_t count, char* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t start = vocabulary.starts[ids[i]], length = vocabulary.starts[ids[i] + 1] - start;
    std::memcpy(out, vocabulary.spelling + start, static_cast<std::size_t>(length));
    out += length;
  }
}

}  // namespace smol
