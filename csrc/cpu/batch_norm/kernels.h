// All kernels of BatchNorm + ReLU + scSE for one instruction set; as in ../kernels.h, which is
// compiled by itself.

#include "problem.h"

namespace scse {
namespace SCSE_ISA {

#include "../vec.h"
#include "../../formulas.h"
#include "../strip.h"
#include "../planes.h"
#include "../channels_last.h"
#include "../excite.h"
#include "../schedule.h"
#include "statistics.h"
#include "planes.h"
#include "channels_last.h"
#include "schedule.h"

extern const NormKernels<float> float_norm_kernels{run_norm<float, true>, run_norm<float, false>};
extern const NormKernels<double> double_norm_kernels{run_norm<double, true>,
                                                     run_norm<double, false>};
extern const NormKernels<half> half_norm_kernels{run_norm<half, true>, run_norm<half, false>};
extern const NormKernels<bfloat16> bfloat16_norm_kernels{run_norm<bfloat16, true>,
                                                         run_norm<bfloat16, false>};

}  // namespace SCSE_ISA
}  // namespace scse
