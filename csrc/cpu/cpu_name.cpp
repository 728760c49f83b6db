#include "operations_cpu.h"

namespace dlvae {

std::string cpu_name() { return kernels().name; }

std::string cpu_names(bool all) {
  int count;
  const InstructionSet* sets = instruction_sets(&count);
  std::string names;
  for (int i = 0; i < count; ++i)
    if (all || sets[i].available) names += (names.empty() ? "" : " ") + std::string(sets[i].name);
  return names;
}

}  // namespace dlvae
