#include "order.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace smol {

namespace {

constexpr std::uint64_t kMaxSize = std::uint64_t{1} << 62;

// splitmix64's output function (Steele, Lea, Flood 2014): every input bit reaches every output bit.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

int bits_for(std::uint64_t size) {  // the least b with 2^b >= size
  int bits = 0;
  while ((std::uint64_t{1} << bits) < size) ++bits;
  return bits;
}

// Two keys of one (seed, source): the order of the pages of an epoch, and of the windows of a block of it.
std::uint64_t page_key(std::uint64_t key, std::int64_t epoch) {
  return mix(mix(key ^ 0x70616765ULL) ^ static_cast<std::uint64_t>(epoch));
}
std::uint64_t window_key(std::uint64_t key, std::int64_t epoch, std::int64_t block) {
  return mix(mix(mix(key ^ 0x626c6f636bULL) ^ static_cast<std::uint64_t>(epoch)) ^ static_cast<std::uint64_t>(block));
}

void check(const Layout& l) {
  const auto limit = static_cast<std::int64_t>(kMaxSize);
  if (l.pages < 1 || l.windows_per_page < 1 || l.block_pages < 1 || l.pages > limit / l.windows_per_page) {
    throw std::invalid_argument("a source needs pages, windows_per_page and block_pages >= 1 and at most 2^62 windows, got " +
                                std::to_string(l.pages) + ", " + std::to_string(l.windows_per_page) + ", " +
                                std::to_string(l.block_pages));
  }
}

// Neighbouring positions share an epoch and a block, so their round keys are kept between lookups.
struct Reader {
  explicit Reader(const Layout& layout)
      : layout(layout),
        pages(1, 0),
        windows(1, 0),
        block_pages(std::min(layout.block_pages, layout.pages)),
        per_block(block_pages * layout.windows_per_page) {}

  std::int64_t read(std::int64_t at_epoch, std::int64_t index_in_epoch) {
    enter(at_epoch);
    open(index_in_epoch / per_block);
    const auto spread = static_cast<std::int64_t>(windows(index_in_epoch - block * per_block));
    const auto page = static_cast<std::int64_t>(pages(block * block_pages + spread / layout.windows_per_page));
    return page * layout.windows_per_page + spread % layout.windows_per_page;
  }

  std::int64_t locate(std::int64_t at_epoch, std::int64_t window) {
    enter(at_epoch);
    const auto place = static_cast<std::int64_t>(pages.inverse(window / layout.windows_per_page));
    open(place / block_pages);
    const std::int64_t spread =
        (place - block * block_pages) * layout.windows_per_page + window % layout.windows_per_page;
    return block * per_block + static_cast<std::int64_t>(windows.inverse(spread));
  }

  Layout layout;

 private:
  void enter(std::int64_t at_epoch) {
    if (at_epoch == epoch) return;
    pages = KeyedPermutation(layout.pages, page_key(layout.key, at_epoch));
    epoch = at_epoch;
    block = -1;
  }

  void open(std::int64_t at_block) {
    if (at_block == block) return;
    // The last block of an epoch is shorter when the pages do not divide evenly.
    const std::int64_t in_block = std::min(block_pages, layout.pages - at_block * block_pages);
    windows = KeyedPermutation(in_block * layout.windows_per_page, window_key(layout.key, epoch, at_block));
    block = at_block;
  }

  KeyedPermutation pages, windows;
  std::int64_t block_pages, per_block;
  std::int64_t epoch = -1, block = -1;
};

}  // namespace

// An unbalanced Feistel network on the next power of two, made exact by cycle walking: apply it again until the value
// falls below size. Any round function gives a bijection; fewer than two walks are needed on average.
KeyedPermutation::KeyedPermutation(std::uint64_t size, std::uint64_t key) : size_(size) {
  if (size < 1 || size > kMaxSize) {
    throw std::invalid_argument("a permutation has 1 to 2^62 elements, got " + std::to_string(size));
  }
  const int bits = bits_for(size);
  right_bits_ = bits - bits / 2;
  left_mask_ = (std::uint64_t{1} << bits / 2) - 1;
  right_mask_ = (std::uint64_t{1} << right_bits_) - 1;
  // A round of a tiny domain draws from few functions: with 10 rounds the 120 orders of 5 elements come unevenly
  // (chi-square, 36 standard deviations off over 24,000 keys), with 24 evenly. Large domains need fewer.
  rounds_ = bits < 16 ? kMaxRounds : 10;
  for (int i = 0; i < rounds_; ++i) round_keys_[i] = mix(key + 0x9e3779b97f4a7c15ULL * (i + 1));
}

std::uint64_t KeyedPermutation::operator()(std::uint64_t index) const {
  do {
    std::uint64_t left = index >> right_bits_, right = index & right_mask_;
    for (int i = 0; i < rounds_; i += 2) {
      left ^= mix(right ^ round_keys_[i]) & left_mask_;
      right ^= mix(left ^ round_keys_[i + 1]) & right_mask_;
    }
    index = left << right_bits_ | right;
  } while (index >= size_);
  return index;
}

std::uint64_t KeyedPermutation::inverse(std::uint64_t image) const {
  do {
    std::uint64_t left = image >> right_bits_, right = image & right_mask_;
    for (int i = rounds_; i > 0; i -= 2) {
      right ^= mix(left ^ round_keys_[i - 1]) & right_mask_;
      left ^= mix(right ^ round_keys_[i - 2]) & left_mask_;
    }
    image = left << right_bits_ | right;
  } while (image >= size_);
  return image;
}

void lookup_windows(const std::vector<Layout>& layouts, const std::uint16_t* source, const std::int64_t* position,
                    std::int64_t count, std::int64_t* epoch, std::int64_t* window) {
  std::vector<Reader> readers;
  readers.reserve(layouts.size());
  for (const Layout& layout : layouts) {
    check(layout);
    readers.emplace_back(layout);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (source[i] >= readers.size()) {
      throw std::invalid_argument("row " + std::to_string(i) + " names source " + std::to_string(source[i]) + " of " +
                                  std::to_string(readers.size()));
    }
    if (position[i] < 0) throw std::invalid_argument("positions start at 0, got " + std::to_string(position[i]));
    Reader& reader = readers[source[i]];
    const std::int64_t per_epoch = reader.layout.pages * reader.layout.windows_per_page;
    epoch[i] = position[i] / per_epoch;
    window[i] = reader.read(epoch[i], position[i] % per_epoch);
  }
}

void locate_windows(const Layout& layout, const std::int64_t* epoch, const std::int64_t* window, std::int64_t count,
                    std::int64_t* position) {
  check(layout);
  Reader reader(layout);
  const std::int64_t per_epoch = layout.pages * layout.windows_per_page;
  const std::int64_t epochs = std::numeric_limits<std::int64_t>::max() / per_epoch;
  for (std::int64_t i = 0; i < count; ++i) {
    if (window[i] < 0 || window[i] >= per_epoch || epoch[i] < 0 || epoch[i] >= epochs) {
      throw std::invalid_argument("window " + std::to_string(window[i]) + " of epoch " + std::to_string(epoch[i]) +
                                  " does not exist: an epoch has " + std::to_string(per_epoch) + " windows");
    }
    position[i] = epoch[i] * per_epoch + reader.locate(epoch[i], window[i]);
  }
}

}  // namespace smol
