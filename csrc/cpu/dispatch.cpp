#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

#if defined(DLVAE_X86)
#include <cpuid.h>
#endif
#if defined(DLVAE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlvae {
namespace {

#if defined(DLVAE_X86)
// Clang's __builtin_cpu_supports does not know this name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Whether the processor has bfloat16 tiles and the operating system grants them to this process on request.
bool has_tiles() {
#if defined(DLVAE_EMULATE_TILES)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22, AVX512_BF16 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILE) == 0 || (d & BF16) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & AVX512_BF16) == 0) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const InstructionSet* instruction_sets(int* count) {
#if defined(DLVAE_X86)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const bool amx = vnni && has_tiles();
  // VNNI comes before AMX: on a Xeon of the fifth generation, a search by three bfloat16 products on tiles takes longer
  // than one by 16-bit integers, with 8 to 256 features.
  static const InstructionSet all[] = {
      {"vnni", vnni, vnni_kernels},         {"amx", amx, amx_kernels},
      {"avx512", avx512, avx512_kernels},   {"avx2", avx2, avx2_kernels},
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
  // The variable is read at each call, as DLVAE_BACKEND is.
  const char* name = std::getenv("DLVAE_CPU");
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (name == nullptr || *name == 0) {
      if (all[i].available) return all[i].table();
    } else if (std::strcmp(name, all[i].name) == 0) {
      if (all[i].available) return all[i].table();
      throw std::runtime_error(
          std::string("expected DLVAE_CPU to name an instruction set of this processor, got '") + name + "'");
    }
    known += (i == 0 ? "" : ", ") + std::string(all[i].name);
  }
  throw std::runtime_error("expected DLVAE_CPU to be one of " + known + ", got '" + name + "'");
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  // The size is exact, so that the address sanitizer detects an access one byte beyond it.
  if (posix_memalign(&memory, 64, (size_t)bytes) != 0) throw std::bad_alloc();
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
  // This is a hint: the result is the same if the system does not follow it.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dlvae
