// MinHash over words, for near-duplicate search (curate/duplicates.py). Pure C++.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace smol {

// Band keys of texts: texts that share a word n-gram set to a share s agree in one key with probability s^rows.
// Words are runs of ASCII letters and of bytes above 127, lower-cased where they are ASCII; a run of digits is the word
// "0"; everything else only separates.
class MinHash {
 public:
  MinHash(int ngram, int bands, int rows, std::uint64_t seed);

  // Writes `bands` keys to `out`; false (and nothing written) when the text has no word. A text of fewer words than an
  // n-gram is one short n-gram.
  bool keys(std::string_view text, std::uint64_t* out);

 private:
  int ngram_, bands_, rows_;
  std::vector<std::uint64_t> factors_, offsets_;  // of hash function k: x -> high half of (factor * x + offset)
  std::vector<std::uint64_t> words_;              // of the text at hand
  std::vector<std::uint32_t> least_;
};

}  // namespace smol
