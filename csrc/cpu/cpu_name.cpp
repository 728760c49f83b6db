#include "operations.h"

std::string dlvae::cpu_name() { return kernels().name; }
