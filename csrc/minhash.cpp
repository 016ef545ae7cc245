#include "minhash.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

namespace smol {
namespace {

std::uint64_t mix(std::uint64_t x) {  // splitmix64's finaliser
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ULL;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

enum Kind : unsigned char { kSeparator, kLetter, kDigit };

constexpr std::array<unsigned char, 256> make_kinds() {
  std::array<unsigned char, 256> kinds{};
  for (int byte = 0; byte < 256; ++byte) {
    const bool letter = (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') || byte >= 128;
    kinds[static_cast<std::size_t>(byte)] = letter ? kLetter : byte >= '0' && byte <= '9' ? kDigit : kSeparator;
  }
  return kinds;
}

constexpr std::array<unsigned char, 256> kKinds = make_kinds();

// Hashes of the words of a text, in their order.
void hash_words(std::string_view text, std::vector<std::uint64_t>& words) {
  words.clear();
  const std::size_t size = text.size();
  for (std::size_t at = 0; at < size;) {
    const auto kind = kKinds[static_cast<unsigned char>(text[at])];
    std::uint64_t hash = 0xcbf29ce484222325ULL;  // FNV-1a
    if (kind == kDigit) hash = (hash ^ '0') * 0x100000001b3ULL;
    std::size_t end = at;
    for (; end < size; ++end) {
      const auto byte = static_cast<unsigned char>(text[end]);
      if (kKinds[byte] != kind) break;
      if (kind == kLetter) hash = (hash ^ (byte < 128 ? byte | 0x20u : byte)) * 0x100000001b3ULL;
    }
    if (kind != kSeparator) words.push_back(mix(hash));
    at = end;
  }
}

}  // namespace

MinHash::MinHash(int ngram, int bands, int rows, std::uint64_t seed) : ngram_(ngram), bands_(bands), rows_(rows) {
  if (ngram < 1 || bands < 1 || rows < 1 || bands > 1024 || rows > 1024) {
    throw std::invalid_argument("MinHash: n-grams of " + std::to_string(ngram) + " words, " + std::to_string(bands) +
                                " bands of " + std::to_string(rows) + " rows; all must be 1 to 1024");
  }
  const auto functions = static_cast<std::size_t>(bands) * static_cast<std::size_t>(rows);
  std::uint64_t state = mix(seed + 1);
  for (std::size_t k = 0; k < functions; ++k) {
    factors_.push_back(mix(state += 0x9e3779b97f4a7c15ULL) | 1);
    offsets_.push_back(mix(state += 0x9e3779b97f4a7c15ULL));
  }
  least_.resize(functions);
}

bool MinHash::keys(std::string_view text, std::uint64_t* out) {
  hash_words(text, words_);
  if (words_.empty()) return false;
  std::fill(least_.begin(), least_.end(), std::numeric_limits<std::uint32_t>::max());
  const std::size_t length = std::min(words_.size(), static_cast<std::size_t>(ngram_));
  const std::size_t functions = least_.size();
  for (std::size_t start = 0; start + length <= words_.size(); ++start) {
    std::uint64_t shingle = 0;
    for (std::size_t i = 0; i < length; ++i) shingle = mix(shingle ^ words_[start + i]) + i;
    for (std::size_t k = 0; k < functions; ++k) {
      const auto value = static_cast<std::uint32_t>((factors_[k] * shingle + offsets_[k]) >> 32);
      least_[k] = std::min(least_[k], value);
    }
  }
  for (int band = 0; band < bands_; ++band) {
    std::uint64_t key = static_cast<std::uint64_t>(band);
    for (int row = 0; row < rows_; ++row) key = mix(key ^ least_[static_cast<std::size_t>(band * rows_ + row)]) + 1;
    out[band] = key;
  }
  return true;
}

}  // namespace smol
