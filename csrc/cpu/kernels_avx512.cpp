// The kernels for x86-64 processors with AVX-512 (F, BW, DQ and VL).
#define LDM_FUSED_ISA avx512
#define LDM_FUSED_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define LDM_FUSED_VECTOR_BYTES 64

#include "cpu/kernels_x86.inl"
