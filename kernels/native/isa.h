// The instruction sets that every kernel is compiled for, and the choice among them at run time.
#pragma once

// For functions that objects of several instruction sets use: the linker would keep one copy of them for the whole
// module, and it could be the AVX-512 one.
#define RETINAR_INLINE __attribute__((always_inline)) inline

namespace retinar {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// Whether this processor and operating system can run the set (and whether it was compiled in).
bool runnable(Isa isa);

// The widest runnable set.
Isa best();

}  // namespace retinar

// Declares one function of every instruction set: RETINAR_DECLARE(void rms_norm(const RmsNorm&)).
// RETINAR_SELECT(isa, rms_norm) is the pointer to the chosen one.
#ifdef RETINAR_X86
#define RETINAR_DECLARE(declaration)      \
  namespace retinar::portable {           \
  declaration;                            \
  }                                       \
  namespace retinar::avx2 {               \
  declaration;                            \
  }                                       \
  namespace retinar::avx512 {             \
  declaration;                            \
  }                                       \
  namespace retinar::avx512_bf16 {        \
  declaration;                            \
  }
#define RETINAR_SELECT(isa, function)                                       \
  ((isa) == retinar::Isa::avx512_bf16 ? &retinar::avx512_bf16::function     \
   : (isa) == retinar::Isa::avx512    ? &retinar::avx512::function          \
   : (isa) == retinar::Isa::avx2      ? &retinar::avx2::function            \
                                      : &retinar::portable::function)
#else
#define RETINAR_DECLARE(declaration) \
  namespace retinar::portable {      \
  declaration;                       \
  }
#define RETINAR_SELECT(isa, function) (&retinar::portable::function)
#endif
