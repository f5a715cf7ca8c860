// The kernel that takes 32 KB of parameters. A file of its own, and so a module of its own: a driver that
// knows no such parameters would refuse everything that is compiled beside it.
#include "cuda/device.h"

namespace fused_optim {

LargePatchKernel large_patch_kernel() { return patch_kernel<kPatchWords>; }

}  // namespace fused_optim
