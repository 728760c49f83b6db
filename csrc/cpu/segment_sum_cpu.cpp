#include "segment_sum_cpu.h"

#include <algorithm>

namespace dlvae {
namespace {

// The size of float32 rows that stay in a core's cache while they are read repeatedly.
constexpr int64_t NEAR_BYTES = 512 << 10;
// The most memory for rows that are converted to float32 first.
constexpr int64_t COPY_BYTES = 8 << 20;
// The fewest pairs of a code per block of rows for which loading and storing its sum is worthwhile.
constexpr int64_t PAIRS_PER_VISIT = 8;

int64_t threads_for(int64_t work) { return std::clamp<int64_t>(work / 32768, 1, torch::stable::get_num_threads()); }

// The partition of the work over threads. A pair and a code each cost as much as they have features.
class Shares {
 public:
  Shares(const Segments& segments, int64_t features, int64_t count)
      : segments_(segments), columns_((features + COLUMN - 1) / COLUMN), count_(count) {}

  Share operator()(int64_t i) const {
    Share share;
    begin(i, &share.first_code, &share.first_feature);
    begin(i + 1, &share.last_code, &share.last_feature);
    return share;
  }

 private:
  // Threads share no cache line: a share begins at a multiple of this many features.
  static constexpr int64_t COLUMN = 16;

  int64_t work_before(int64_t code) const { return (segments_.starts[code] + code) * columns_; }

  void begin(int64_t i, int64_t* code, int64_t* feature) const {
    const int64_t target = work_before(segments_.codes) / count_ * i;
    if (i == count_) {
      *code = segments_.codes;
      *feature = 0;
      return;
    }
    int64_t low = 0, high = segments_.codes;  // work_before(low) <= target < work_before(high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (work_before(middle) <= target ? low : high) = middle;
    }
    const int64_t column = (target - work_before(low)) / (segments_.starts[low + 1] - segments_.starts[low] + 1);
    *code = low;
    *feature = column * COLUMN;
  }

  const Segments& segments_;
  int64_t columns_, count_;
};

}  // namespace

void check_codes(int64_t num_codes, int64_t num_heads, const Rows& rows) {
  STD_TORCH_CHECK(num_codes >= 1, "expected num_codes to be at least 1, got ", num_codes);
  STD_TORCH_CHECK(
      num_heads >= 1 && rows.count % num_heads == 0, "expected num_heads to be at least 1 and to divide the ",
      rows.count, " vectors, got ", num_heads);
}

SortedPairs::SortedPairs(
    const Indices& codes, int64_t per_row, int64_t num_codes, int64_t num_heads, const float* weights,
    const bool* left_out)
    : codes_(num_heads * num_codes),
      starts_(new_array<int64_t>(codes_ + 1)),
      rows_(new_array<uint32_t>(codes.count)),
      weights_(weights == nullptr ? nullptr : new_array<float>(codes.count)) {
  const int64_t rows = per_row == 0 ? 0 : codes.count / per_row;
  STD_TORCH_CHECK(rows <= UINT32_MAX, "expected indices of at most ", UINT32_MAX, " vectors, got ", rows);
  // Each thread has counts of its own, which does not pay if there are many codes.
  const int64_t parts = std::min(threads_for(codes.count), 1 + codes.count / (2 * codes_));
  const Array<int64_t> next = new_array<int64_t>(parts * codes_);
  const auto for_parts = [&](const auto& f) {
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        f(next.get() + part * codes_, rows * part / parts, rows * (part + 1) / parts);
    });
  };
  // Calls f(code, row, pair) for the pairs of rows [begin, end) that are not left out.
  const auto for_pairs = [&](int64_t begin, int64_t end, const auto& f) {
    int64_t first = begin % num_heads * num_codes;  // the first code of the head
    for (int64_t row = begin; row < end; ++row) {
      const bool is_left_out = left_out != nullptr && left_out[row];
      for (int64_t p = row * per_row; p < (row + 1) * per_row && !is_left_out; ++p)
        if (codes.data[p] >= 0) f(first + codes.data[p], row, p);
      first = first + num_codes == codes_ ? 0 : first + num_codes;
    }
  };
  for_parts([&](int64_t* counts, int64_t begin, int64_t end) {
    codes.check(begin * per_row, end * per_row, num_codes);
    std::fill(counts, counts + codes_, 0);
    for_pairs(begin, end, [&](int64_t code, int64_t, int64_t) { ++counts[code]; });
  });
  int64_t start = 0;
  for (int64_t code = 0; code < codes_; ++code) {
    starts_[code] = start;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = next[part * codes_ + code];
      next[part * codes_ + code] = start;
      start += count;
    }
  }
  starts_[codes_] = start;
  for_parts([&](int64_t* places, int64_t begin, int64_t end) {
    for_pairs(begin, end, [&](int64_t code, int64_t row, int64_t pair) {
      const int64_t place = places[code]++;
      rows_[place] = static_cast<uint32_t>(row);
      if (weights != nullptr) weights_[place] = weights[pair];
    });
  });
}

Segments SortedPairs::segments(float weight) const {
  return {codes_, starts_.get(), rows_.get(), weights_.get(), weight};
}

SegmentSum::SegmentSum(const Segments& segments, int64_t features, float* sums, int64_t ld)
    : segments_(segments), features_(features), ld_(ld), sums_(sums) {
  const int64_t count = segments.starts[segments.codes];
  threads_ = threads_for((count + segments.codes) * features);
  // A code that two threads share has two places.
  places_ = new_array<int64_t>(segments.codes + threads_);
  totals_ = new_array<double>(std::min(segments.codes, count / SUM_CHAIN + 1) * features);
}

void SegmentSum::add_part(
    int64_t thread, int64_t begin, int64_t end, const float* data, int64_t data_ld, bool is_far) const {
  const Share share = Shares(segments_, features_, threads_)(thread);
  kernels().sum_segments(
      segments_, share, begin, end, data, data_ld, is_far, places_.get() + share.first_code + thread, totals_.get(),
      sums_, features_, ld_);
}

void SegmentSum::add(int64_t begin, int64_t end, const float* data, int64_t data_ld) const {
  const bool is_far = (end - begin) * features_ * (int64_t)sizeof(float) > NEAR_BYTES;
  parallel(threads_, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) add_part(thread, begin, end, data, data_ld, is_far);
  });
}

void segment_sum(const Rows& rows, const SortedPairs& pairs, int64_t per_row, float weight, float* sums, int64_t ld) {
  if (rows.features == 0) return;
  const Kernels& k = kernels();
  const Segments segments = pairs.segments(weight);
  const int64_t row_bytes = rows.features * (int64_t)sizeof(float);
  const SegmentSum sum(segments, rows.features, sums, ld);

  const bool in_place = is_dense(rows);
  // With few rows per block and many codes, the sums would be loaded and stored more often than they are added to.
  int64_t block = std::max(NEAR_BYTES / row_bytes, PAIRS_PER_VISIT * segments.codes / std::max<int64_t>(1, per_row));
  if (per_row == 1) block = rows.count;  // no row is read twice
  if (!in_place) block = std::min(block, COPY_BYTES / row_bytes);
  block = std::clamp<int64_t>(block, 1, std::max<int64_t>(1, rows.count));
  const bool is_far = block * row_bytes > NEAR_BYTES;

  const Array<float> copy = new_array<float>(in_place ? 0 : block * rows.features);
  if (in_place) {
    const float* data = static_cast<const float*>(rows.data);
    const int64_t row_stride = rows.strides[0];
    parallel(sum.threads(), 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread)
        for (int64_t begin = 0; begin == 0 || begin < rows.count; begin += block) {
          const int64_t end = std::min(begin + block, rows.count);
          sum.add_part(thread, begin, end, data + begin * row_stride, row_stride, is_far);
        }
    });
    return;
  }
  for (int64_t begin = 0; begin == 0 || begin < rows.count; begin += block) {
    const int64_t end = std::min(begin + block, rows.count);
    parallel(end - begin, 1 + 16384 / rows.features, [&](int64_t first, int64_t last) {
      k.load_rows(rows, begin + first, begin + last, copy.get() + first * rows.features, rows.features);
    });
    sum.add(begin, end, copy.get(), rows.features);
  }
}

}  // namespace dlvae
