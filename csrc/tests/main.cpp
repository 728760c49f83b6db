// Runs the kernels of every instruction set that this processor has against plain loops; see `make test-asan`.
#include "check.h"

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
    dlvae::test_softmax(kernels);
    dlvae::test_topk(kernels);
    std::printf("%s: ok\n", sets[i].name);
  }
  return 0;
}
