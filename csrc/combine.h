// How the two branches are combined. The formulas are in formulas.inc.
#pragma once

namespace scse {

// The first four are the codes of scse_kernels.ops.COMBINE; then the branches alone.
enum class Combine { add, max, mul, concat, channel, spatial };

}  // namespace scse
