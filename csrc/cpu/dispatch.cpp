#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace dlvae {
namespace {

struct Choice {
  const char* name;
  bool available;
  const Kernels& (*table)();
};

// From the best to the plainest.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const Choice all[] = {
      {"vnni", vnni, vnni_kernels},
      {"avx512", avx512, avx512_kernels},
      {"avx2", avx2, avx2_kernels},
      {"portable", true, portable_kernels},
  };
#else
  static const Choice all[] = {{"portable", true, portable_kernels}};
#endif
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

const Kernels& kernels() {
  int count;
  const Choice* all = choices(&count);
  // Read at each call, as DLVAE_BACKEND is.
  const char* name = std::getenv("DLVAE_CPU");
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (name == nullptr || *name == 0) {
      if (all[i].available) return all[i].table();
    } else if (std::strcmp(name, all[i].name) == 0) {
      if (all[i].available) return all[i].table();
      throw std::runtime_error(std::string("DLVAE_CPU is '") + name + "', which this processor cannot run");
    }
    known += (i == 0 ? "" : ", ") + std::string(all[i].name);
  }
  throw std::runtime_error(std::string("DLVAE_CPU is '") + name + "'; it needs to be one of " + known);
}

void* allocate(int64_t bytes) {
  const size_t size = ((size_t)bytes + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, size == 0 ? 64 : size);
  if (memory == nullptr) throw std::bad_alloc();
  prefer_large_pages(memory, bytes);
  return memory;
}

void release(void* memory) { std::free(memory); }

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * PAGE)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
  // A wish: where the system grants it to nobody, all is as it was.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dlvae
