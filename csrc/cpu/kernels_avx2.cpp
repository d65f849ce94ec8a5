// The kernels for x86-64 processors with AVX2, FMA and F16C.
#define LDM_FUSED_ISA avx2
#define LDM_FUSED_TARGET "avx2,fma,f16c"
#define LDM_FUSED_VECTOR_BYTES 32

#include "cpu/kernels_x86.inl"
