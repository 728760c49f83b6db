// The peak rate of score computation, as a reference for benchmarks.
#include <atomic>
#include <chrono>

#include "operations_cpu.h"

double dlvae::search_rate() {
  const Kernels& k = kernels();
  const auto run = [&](int64_t rounds) {
    std::atomic<int64_t> products{0};
    const auto begin = std::chrono::steady_clock::now();
    parallel(torch::stable::get_num_threads(), 1, [&](int64_t first, int64_t last) {
      products += k.repeat_scores((last - first) * rounds);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    return static_cast<double>(products) / seconds.count();
  };
  double best = 0;
  for (int i = 0; i < 7; ++i) best = std::max(best, run(20000));
  return best;
}
