// Which instruction set a source is compiled for: its namespace, and as which other one its vectors are.
//
// -DCPU_KERNELS_AVX512BF16, _AVX512VNNI, _AVX512, _AVXVNNI, _AVX2, _NEON or _PORTABLE says it.
#ifndef CPU_KERNELS_ISA_H_
#define CPU_KERNELS_ISA_H_

#if defined(CPU_KERNELS_AVX512BF16)
#define CPU_KERNELS_ISA avx512bf16
#define CPU_KERNELS_AVX512  // product_bf16.h has what more it can do
#elif defined(CPU_KERNELS_AVX512VNNI)
#define CPU_KERNELS_ISA avx512vnni
#define CPU_KERNELS_AVX512  // product_int16.h has what more it can do, and so can avx512bf16
#elif defined(CPU_KERNELS_AVX512)
#define CPU_KERNELS_ISA avx512
#elif defined(CPU_KERNELS_AVXVNNI)
#define CPU_KERNELS_ISA avxvnni
#define CPU_KERNELS_AVX2
#elif defined(CPU_KERNELS_AVX2)
#define CPU_KERNELS_ISA avx2
#elif defined(CPU_KERNELS_NEON)
#define CPU_KERNELS_ISA neon
#elif defined(CPU_KERNELS_PORTABLE)
#define CPU_KERNELS_ISA portable
#else
#error "compile with -DCPU_KERNELS_ and one of AVX512BF16, AVX512VNNI, AVX512, AVXVNNI, AVX2, NEON, PORTABLE"
#endif

#endif  // CPU_KERNELS_ISA_H_
