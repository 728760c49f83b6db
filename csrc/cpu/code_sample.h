// Properties of all codes, estimated from a sample: whether they lie around a centre far from zero, and whether any
// code is repeated.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors_cpu.h"

namespace dlvae {

// The number of codes in a sample.
constexpr int64_t SAMPLE = 64;

// Calls f(k) for all codes or, if there are more than SAMPLE, for SAMPLE of them, spread aperiodically.
template <class F>
void for_sample(int64_t count, const F& f) {
  for (uint64_t i = 0; i < (uint64_t)std::min(count, SAMPLE); ++i)
    f(count <= SAMPLE ? (int64_t)i : (int64_t)((uint32_t)(i * 0x9e3779b1) * (uint64_t)count >> 32));
}

// Returns the mean of the codes [K, D] if subtracting it makes codes shorter than half their lengths, else null. The
// sample decides; it leaves out codes that are far longer than most. norm_of(k) is |c|, or NaN if code k does not
// count.
template <class F>
Array<float> centre_of(const float* codes, int64_t count, int64_t features, const F& norm_of) {
  // Subtracting a longer centre might overflow float32.
  constexpr double LARGEST = 0x1p100;
  std::vector<std::pair<double, int64_t>> sample;  // |c|, k
  for_sample(count, [&](int64_t k) {
    const double norm = norm_of(k);
    if (!std::isnan(norm)) sample.emplace_back(norm, k);
  });
  if (sample.empty()) return nullptr;
  const auto middle = sample.begin() + sample.size() / 2;
  std::nth_element(sample.begin(), middle, sample.end());
  const double longest = 4 * middle->first;
  std::vector<double> mean(features);
  double squares = 0, square = 0, size = 0;
  for (const auto& [norm, k] : sample) {
    if (norm > longest) continue;
    squares += norm * norm;
    ++size;
    for (int64_t d = 0; d < features; ++d) mean[d] += codes[k * features + d];
  }
  for (double& each : mean) {
    each /= size;
    square += each * each;
  }
  const bool is_far = square > 0.75 * squares / size;
  if (!is_far || square > LARGEST * LARGEST) return nullptr;
  Array<float> centre = new_array<float>(features);
  std::copy(mean.begin(), mean.end(), centre.get());
  return centre;
}

// Returns the codes [K, D] minus their centre, rounded to float32.
Array<float> without_centre(const float* codes, int64_t count, int64_t features, const float* centre);

// Calls f(k, first) in ascending order for each code k that equals an earlier one, where `first` is the first of them.
// Does nothing if no code of the sample shares its hash with another code: then repeated codes are too few to matter.
// counts(k): whether code k is compared; are_equal(k, other): whether two codes with the same hash are equal.
template <class Counts, class Equal, class F>
void for_repeated(int64_t count, const uint32_t* hashes, const Counts& counts, const Equal& are_equal, const F& f) {
  int64_t ids[SAMPLE + 1], size = 0;
  uint8_t sampled[4096] = {};
  const auto place_of = [&](int64_t k) { return hashes[k] * 0x9e3779b1u >> 20; };
  for_sample(count, [&](int64_t k) {
    if (!counts(k)) return;
    ids[++size] = k;
    sampled[place_of(k)] = (uint8_t)size;
  });
  bool any_repeated = false;
  for (int64_t k = 0; k < count && !any_repeated; ++k) {
    const int id = sampled[place_of(k)];
    any_repeated = id != 0 && ids[id] != k && hashes[ids[id]] == hashes[k];
  }
  if (!any_repeated) return;
  int bits = 1;
  while (int64_t{1} << bits < 2 * count) ++bits;
  const int64_t places = int64_t{1} << bits;
  std::vector<int32_t> firsts(places, -1);
  for (int64_t k = 0; k < count; ++k) {
    if (!counts(k)) continue;
    int64_t place = hashes[k] * 0x9e3779b97f4a7c15u >> (64 - bits);
    while (firsts[place] >= 0 && !(hashes[firsts[place]] == hashes[k] && are_equal(k, firsts[place])))
      place = (place + 1) % places;
    if (firsts[place] >= 0) {
      f(k, (int64_t)firsts[place]);
    } else {
      firsts[place] = (int32_t)k;
    }
  }
}

}  // namespace dlvae
