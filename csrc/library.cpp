// The private operations dlvae_native::, one for each operation in dlvae::, and queries about the CPU library.
#include <torch/csrc/stable/library.h>

#include "cpu/operations_cpu.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  dlvae::define_operations(m);
  m.def("cpu_name() -> str");
  m.def("cpu_names(bool all) -> str");
  m.def("search_rate() -> float");
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
  m.impl("cpu_names", TORCH_BOX(&dlvae::cpu_names));
  m.impl("search_rate", TORCH_BOX(&dlvae::search_rate));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) { dlvae::implement_operations(m); }
