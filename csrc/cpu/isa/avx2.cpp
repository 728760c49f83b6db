// AVX2 with FMA.
#define ISA avx2
#define TARGET "avx2,fma,f16c"
#define DLVAE_AVX2
#include "compile_table.h"
