// megatron_smol._csrc: the numpy face of blend.cpp, order.cpp, minhash.cpp and spell.h. Arguments are checked here or there and turn into
// ValueError; the work runs without the GIL, so that a prefetching thread does not stop the trainer.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "blend.h"
#include "minhash.h"
#include "order.h"
#include "spell.h"

namespace py = pybind11;

namespace {

// No forcecast: an array of another type is an error, not a silent copy that may have lost bits.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple blend_period(const std::vector<std::int64_t>& numerators) {
  smol::Period period;
  {
    py::gil_scoped_release nogil;
    period = smol::build_period(numerators);
  }
  const auto slots = static_cast<py::ssize_t>(period.source.size());
  return py::make_tuple(py::array_t<std::uint16_t>(slots, period.source.data()),
                        py::array_t<std::int32_t>(slots, period.ordinal.data()));
}

py::tuple blend_lookup(const Array<std::uint16_t>& period_source, const Array<std::int32_t>& period_ordinal,
                       const std::vector<std::int64_t>& numerators, std::int64_t start, std::int64_t stop) {
  const std::int64_t period = period_source.size();
  if (period < 1 || period_ordinal.size() != period) throw std::invalid_argument("blend_lookup: broken period");
  if (start < 0 || stop < start) {
    throw std::invalid_argument("samples [" + std::to_string(start) + ", " + std::to_string(stop) + ") are not a range");
  }
  const std::uint16_t* slots = period_source.data();
  py::array_t<std::uint16_t> source(stop - start);
  py::array_t<std::int64_t> ordinal(stop - start);
  std::uint16_t* out_source = source.mutable_data();
  std::int64_t* out_ordinal = ordinal.mutable_data();
  const std::int32_t* ordinals = period_ordinal.data();
  {
    py::gil_scoped_release nogil;
    std::int64_t turn = start / period, slot = start % period;
    for (std::int64_t i = 0; i < stop - start; ++i) {
      if (slots[slot] >= numerators.size()) throw std::invalid_argument("blend_lookup: period names an unknown source");
      out_source[i] = slots[slot];
      out_ordinal[i] = turn * numerators[slots[slot]] + ordinals[slot];
      if (++slot == period) {
        slot = 0;
        ++turn;
      }
    }
  }
  return py::make_tuple(std::move(source), std::move(ordinal));
}

py::tuple build_blending_indices(const std::vector<double>& weights, std::int64_t size) {
  if (size < 0) throw std::invalid_argument("size must not be negative, got " + std::to_string(size));
  py::array_t<std::int16_t> source(size);
  py::array_t<std::int64_t> ordinal(size);
  std::int16_t* out_source = source.mutable_data();
  std::int64_t* out_ordinal = ordinal.mutable_data();
  {
    py::gil_scoped_release nogil;
    smol::build_blending_indices(weights, size, out_source, out_ordinal);
  }
  return py::make_tuple(std::move(source), std::move(ordinal));
}

using LayoutTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::uint64_t>;

py::tuple lookup_windows(const std::vector<LayoutTuple>& layouts, const Array<std::uint16_t>& source,
                         const Array<std::int64_t>& position) {
  const std::int64_t count = position.size();
  if (source.size() != count) throw std::invalid_argument("lookup_windows: source and position differ in length");
  std::vector<smol::Layout> checked;
  checked.reserve(layouts.size());
  for (const auto& [pages, windows_per_page, block_pages, key] : layouts) {
    checked.push_back({pages, windows_per_page, block_pages, key});
  }
  py::array_t<std::int64_t> epoch(count), window(count);
  const std::uint16_t* in_source = source.data();
  const std::int64_t* in_position = position.data();
  std::int64_t* out_epoch = epoch.mutable_data();
  std::int64_t* out_window = window.mutable_data();
  {
    py::gil_scoped_release nogil;
    smol::lookup_windows(checked, in_source, in_position, count, out_epoch, out_window);
  }
  return py::make_tuple(std::move(epoch), std::move(window));
}

py::array_t<std::int64_t> locate_windows(const LayoutTuple& layout, const Array<std::int64_t>& epoch,
                                         const Array<std::int64_t>& window) {
  const std::int64_t count = window.size();
  if (epoch.size() != count) throw std::invalid_argument("locate_windows: epoch and window differ in length");
  const auto& [pages, windows_per_page, block_pages, key] = layout;
  const smol::Layout checked{pages, windows_per_page, block_pages, key};
  py::array_t<std::int64_t> position(count);
  const std::int64_t *in_epoch = epoch.data(), *in_window = window.data();
  std::int64_t* out = position.mutable_data();
  {
    py::gil_scoped_release nogil;
    smol::locate_windows(checked, in_epoch, in_window, count, out);
  }
  return position;
}

py::array_t<std::int64_t> permute(std::uint64_t size, std::uint64_t key, const Array<std::int64_t>& index,
                                  bool inverse) {
  const smol::KeyedPermutation permutation(size, key);
  const std::int64_t count = index.size();
  py::array_t<std::int64_t> out(count);
  const std::int64_t* in = index.data();
  std::int64_t* result = out.mutable_data();
  py::gil_scoped_release nogil;
  for (std::int64_t i = 0; i < count; ++i) {
    if (in[i] < 0 || static_cast<std::uint64_t>(in[i]) >= size) {
      throw std::invalid_argument("permute: " + std::to_string(in[i]) + " is not in [0, " + std::to_string(size) + ")");
    }
    const auto from = static_cast<std::uint64_t>(in[i]);
    result[i] = static_cast<std::int64_t>(inverse ? permutation.inverse(from) : permutation(from));
  }
  return out;
}

template <typename Id>
py::bytes spell(const Array<Id>& ids, const std::string& spelling, const Array<std::int64_t>& starts) {
  const std::int64_t tokens = starts.size() - 1, count = ids.size();
  if (tokens < 1 || starts.data()[0] != 0 || starts.data()[tokens] != static_cast<std::int64_t>(spelling.size())) {
    throw std::invalid_argument("spell: starts do not fit the spelling");
  }
  const smol::Vocabulary vocabulary{spelling.data(), starts.data(), tokens};
  const Id* in = ids.data();
  std::int64_t total = 0;
  {
    py::gil_scoped_release nogil;
    total = smol::spelled_bytes(vocabulary, in, count);
  }
  py::bytes out(static_cast<const char*>(nullptr), static_cast<py::size_t>(total));
  char* result = PyBytes_AS_STRING(out.ptr());
  {
    py::gil_scoped_release nogil;
    smol::spell(vocabulary, in, count, result);
  }
  return out;
}

// (keys uint64[n, bands], has_words bool[n])
py::tuple minhash_keys(const std::vector<py::bytes>& texts, int ngram, int bands, int rows, std::uint64_t seed) {
  smol::MinHash minhash(ngram, bands, rows, seed);
  std::vector<std::string_view> views(texts.begin(), texts.end());
  const auto count = static_cast<py::ssize_t>(views.size());
  py::array_t<std::uint64_t> keys({count, static_cast<py::ssize_t>(bands)});
  py::array_t<bool> has_words(count);
  std::uint64_t* out = keys.mutable_data();
  bool* any = has_words.mutable_data();
  {
    py::gil_scoped_release nogil;
    for (std::size_t i = 0; i < views.size(); ++i) any[i] = minhash.keys(views[i], out + i * static_cast<std::size_t>(bands));
  }
  return py::make_tuple(std::move(keys), std::move(has_words));
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "The data side in C++: mixtures and keyed permutations (data/blend.py, data/order.py), MinHash (curate/duplicates.py).";
  m.def("blend_period", &blend_period, py::arg("numerators"),
        "(source uint16[D], ordinal int32[D]): one period, D = sum of the numerators.");
  m.def("blend_lookup", &blend_lookup, py::arg("period_source").noconvert(), py::arg("period_ordinal").noconvert(),
        py::arg("numerators"), py::arg("start"), py::arg("stop"),
        "(source uint16[n], ordinal int64[n]) of the samples [start, stop).");
  m.def("build_blending_indices", &build_blending_indices, py::arg("weights"), py::arg("size"),
        "(int16[size], int64[size]), bit-equal to megatron-core's.");
  m.def("lookup_windows", &lookup_windows, py::arg("layouts"), py::arg("source").noconvert(),
        py::arg("position").noconvert(),
        "(epoch int64[n], window int64[n]); layouts: (pages, windows_per_page, block_pages, key) by source.");
  m.def("locate_windows", &locate_windows, py::arg("layout"), py::arg("epoch").noconvert(),
        py::arg("window").noconvert(), "position int64[n]: the inverse of lookup_windows for one source.");
  m.def("spell", &spell<std::uint16_t>, py::arg("ids").noconvert(), py::arg("spelling"),
        py::arg("starts").noconvert(), "The bytes of all ids; token t is spelling[starts[t]:starts[t + 1]].");
  m.def("spell", &spell<std::int32_t>, py::arg("ids").noconvert(), py::arg("spelling"),
        py::arg("starts").noconvert(), "The same for int32 ids.");
  m.def("minhash_keys", &minhash_keys, py::arg("texts"), py::arg("ngram"), py::arg("bands"), py::arg("rows"),
        py::arg("seed"), "(keys uint64[n, bands], has_words bool[n]) of UTF-8 texts; keys of wordless ones mean nothing.");
  m.def("permute", &permute, py::arg("size"), py::arg("key"), py::arg("index").noconvert(),
        py::arg("inverse") = false, "The keyed permutation of [0, size) at each index, or its inverse.");
}
