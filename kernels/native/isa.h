// The instruction sets that every kernel is compiled for, and the choice among them at run time.
#pragma once

namespace retinar {

enum class Isa { portable, avx2, avx512 };

constexpr const char* names[] = {"portable", "avx2", "avx512"};

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
  }
#define RETINAR_SELECT(isa, function)                                  \
  ((isa) == retinar::Isa::avx512 ? &retinar::avx512::function          \
   : (isa) == retinar::Isa::avx2 ? &retinar::avx2::function            \
                                 : &retinar::portable::function)
#else
#define RETINAR_DECLARE(declaration) \
  namespace retinar::portable {      \
  declaration;                       \
  }
#define RETINAR_SELECT(isa, function) (&retinar::portable::function)
#endif
