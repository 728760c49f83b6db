#include "../operations.h"
#include "launch.h"
#include "rows_cuda.cuh"
#include "segment_sum_cuda.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;
// The number of atoms that are added in float32 one after another, a multiple of 32. The sums of such chains are added
// in float64, because the error of a chain grows with its length.
constexpr int CHAIN = 128;

struct Atoms {
  Rows dictionary;
  const int64_t* indices;  // [N, k]; an index outside [0, K) selects an atom of zeros
  int64_t k;
};

// Loads V adjacent features of type T with one instruction of 16 bytes; V = 1 allows any stride.
template <class T, int V>
__device__ void load_features(const Rows& rows, int64_t offset, int64_t feature, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = load_element(rows, offset + feature * rows.stride);
  } else {
    load_floats(static_cast<const T*>(rows.data) + offset + feature, to);
  }
}

// One warp computes the sum of the atoms of one row for 32 * V features.
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 2) decode_kernel(Atoms atoms, const float* values, Rows out) {
  const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + warp_index();
  if (row >= out.count) return;
  const int64_t feature = ((int64_t)blockIdx.y * 32 + lane_index()) * V;
  float sum[V] = {};
  double total[V] = {};
  for (int64_t j = 0; j < atoms.k; j += 32) {
    if (j % CHAIN == 0 && j > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[v] += sum[v];
        sum[v] = 0;
      }
    }
    const int64_t at = row * atoms.k + j + lane_index();
    const int64_t atom = j + lane_index() < atoms.k ? atoms.indices[at] : -1;
    const bool is_in = atom >= 0 && atom < atoms.dictionary.count;
    const int64_t own_offset = is_in ? row_offset(atoms.dictionary, atom) : 0;
    const float own_value = is_in ? values[at] : 0;
    const uint32_t present = __ballot_sync(ALL_LANES, is_in);
    for (int i = 0; i < 32 && j + i < atoms.k; ++i) {
      const int64_t offset = __shfl_sync(ALL_LANES, own_offset, i);
      const float value = __shfl_sync(ALL_LANES, own_value, i);
      if (feature >= out.features || !(present >> i & 1)) continue;
      float atom_features[V];
      load_features<T>(atoms.dictionary, offset, feature, atom_features);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += value * atom_features[v];
    }
  }
  const int64_t to = row_offset(out, row);
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (feature + v < out.features)
      store_element(out, to + (feature + v) * out.stride, atoms.k <= CHAIN ? sum[v] : (float)(total[v] + sum[v]));
}

// One warp computes the inner products of the gradient of one row with its atoms.
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 2) products_kernel(Atoms atoms, Rows grad, float* values) {
  const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + warp_index();
  if (row >= grad.count) return;
  const int64_t grad_at = row_offset(grad, row);
  for (int64_t j = 0; j < atoms.k; ++j) {
    const int64_t atom = atoms.indices[row * atoms.k + j];
    float sum = 0;
    if (atom >= 0 && atom < atoms.dictionary.count) {
      const int64_t offset = row_offset(atoms.dictionary, atom);
      for (int64_t feature = lane_index() * V; feature < grad.features; feature += 32 * V) {
        float atom_features[V];
        load_features<T>(atoms.dictionary, offset, feature, atom_features);
#pragma unroll
        for (int v = 0; v < V; ++v) sum += atom_features[v] * load_element(grad, grad_at + (feature + v) * grad.stride);
      }
    }
    sum = warp_reduce(sum, Sum{});
    if (lane_index() == 0) values[row * atoms.k + j] = sum;
  }
}

// Calls f(T, V) with the type of the dictionary and the widest load that it allows.
template <class F>
void with_vectors(const Rows& dictionary, const F& f) {
  const int64_t bytes = dictionary.type == Type::float32 ? 4 : 2, at_once = 16 / bytes;
  const bool is_aligned = dictionary.stride == 1 && dictionary.dims == 1 && dictionary.features % at_once == 0 &&
                          dictionary.strides[0] % at_once == 0 &&
                          reinterpret_cast<uintptr_t>(dictionary.data) % 16 == 0;
  if (!is_aligned) return f(float{}, std::integral_constant<int, 1>{});
  switch (dictionary.type) {
    case Type::float32: return f(float{}, std::integral_constant<int, 4>{});
    case Type::bfloat16: return f(__nv_bfloat16{}, std::integral_constant<int, 8>{});
    case Type::float16: return f(__half{}, std::integral_constant<int, 8>{});
  }
}

unsigned blocks_of(int64_t rows) { return blocks(ceil_div(rows, THREADS / WARP)); }

Atoms atoms_of(const Tensor& values, const Tensor& indices, const Tensor& dictionary) {
  check_atoms(values, indices, dictionary);
  return {rows_of("dictionary", dictionary), data_of<int64_t>(indices), indices.size(indices.dim() - 1)};
}

}  // namespace

Tensor sparse_decode_fwd(const Tensor& values, const Tensor& indices, const Tensor& dictionary) {
  const Device device(values);
  const Tensor which = indices_of("indices", indices), coefficients = in_float32("values", values, device);
  const Atoms atoms = atoms_of(values, which, dictionary);
  const ScalarType type = values.scalar_type() == dictionary.scalar_type() ? values.scalar_type() : ScalarType::Float;
  const Tensor out = new_tensor(values, shape_with(values, {dictionary.size(1)}), type);
  const Rows rows = rows_of("out", out);
  if (rows.count == 0) return out;
  with_vectors(atoms.dictionary, [&](auto kind, auto vector) {
    constexpr int V = decltype(vector)::value;
    launch(
        "decode", decode_kernel<decltype(kind), V>,
        dim3(blocks_of(rows.count), blocks(ceil_div(rows.features, WARP * V))), THREADS, 0, device.stream, atoms,
        data_of<float>(coefficients), rows);
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_decode_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& indices, const Tensor& dictionary, bool need_values,
    bool need_dictionary) {
  const Device device(grad);
  const Tensor which = indices_of("indices", indices);
  const Atoms atoms = atoms_of(values, which, dictionary);
  const Rows rows = rows_of("grad", grad);
  STD_TORCH_CHECK(
      rows.features == dictionary.size(1) && rows.count * atoms.k == which.numel(),
      "expected grad of shape [..., D] for indices ", shape_text(indices), " and dictionary ", shape_text(dictionary),
      ", got ", shape_text(grad));
  const Tensor grad_values = new_tensor(grad, need_values ? shape_of(values) : std::vector<int64_t>{0});
  const Tensor grad_dictionary = new_tensor(grad, need_dictionary ? shape_of(dictionary) : std::vector<int64_t>{0});
  if (need_values && rows.count > 0) {
    with_vectors(atoms.dictionary, [&](auto kind, auto vector) {
      launch(
          "products", products_kernel<decltype(kind), decltype(vector)::value>, blocks_of(rows.count), THREADS, 0,
          device.stream, atoms, rows, data_of<float>(grad_values));
    });
  }
  if (need_dictionary) {
    const Tensor coefficients = in_float32("values", values, device);
    const SortedPairs pairs(
        grad, {atoms.indices, which.numel(), atoms.k, dictionary.size(0), nullptr, data_of<float>(coefficients)},
        device);
    pairs.sum(grad, rows, nullptr, data_of<float>(grad_dictionary), rows.features, device);
  }
  return {grad_values, grad_dictionary};
}

}  // namespace dlvae
