// All kernels for one instruction set. The file that includes this has switched the compiler to
// that set and has defined SCSE_ISA, the namespace, and SCSE_VECTOR_BYTES, the size of its
// registers. Nothing here may be an inline function of a shared namespace: the linker keeps one
// copy of those, which could be that of an instruction set that the machine lacks.

namespace scse {
namespace SCSE_ISA {

#include "vec.h"
#include "../formulas.h"
#include "strip.h"
#include "planes.h"
#include "channels_last.h"
#include "excite.h"
#include "schedule.h"

extern const Kernels<float> float_kernels{run<float, true>, run<float, false>};
extern const Kernels<double> double_kernels{run<double, true>, run<double, false>};
extern const Kernels<half> half_kernels{run<half, true>, run<half, false>};
extern const Kernels<bfloat16> bfloat16_kernels{run<bfloat16, true>, run<bfloat16, false>};

}  // namespace SCSE_ISA
}  // namespace scse
