#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dlvae {

const InstructionSet* instruction_sets(int* count) {
#if defined(DLVAE_X86)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const InstructionSet all[] = {
      {"vnni", vnni, vnni_kernels},
      {"avx512", avx512, avx512_kernels},
      {"avx2", avx2, avx2_kernels},
      {"portable", true, portable_kernels},
  };
#else
  static const InstructionSet all[] = {{"portable", true, portable_kernels}};
#endif
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels& kernels() {
  int count;
  const InstructionSet* all = instruction_sets(&count);
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
  void* memory = nullptr;
  // Of just that size, so that the address sanitizer sees a byte beyond.
  if (posix_memalign(&memory, 64, (size_t)bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace dlvae
