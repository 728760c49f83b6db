// Compares the kernels of every instruction set that this processor supports with plain loops; see `make test-asan`.
#include "check.h"

// Uninitialised memory is NaN, which shows in results that depend on it.
extern "C" const char* __asan_default_options() { return "malloc_fill_byte=255:max_malloc_fill_size=1000000000"; }

int main() {
  int count;
  const dlvae::InstructionSet* sets = dlvae::instruction_sets(&count);
  for (int i = 0; i < count; ++i) {
    if (!sets[i].available) {
      std::printf("%s: not tested, this processor lacks it\n", sets[i].name);
      continue;
    }
    const dlvae::Kernels& kernels = sets[i].table();
    dlvae::test_rows(kernels);
    dlvae::test_search(kernels);
    dlvae::test_residual(kernels);
    dlvae::test_sums(kernels);
    dlvae::test_topk(kernels);
    dlvae::test_softmax(kernels);
    dlvae::test_entropy(kernels);
    std::printf("%s: ok\n", sets[i].name);
  }
  return 0;
}
