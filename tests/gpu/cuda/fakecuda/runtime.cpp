// A CUDA runtime without a device. It keeps what nvcc's host code registers, has the runtime's
// rules for errors, and hands everything else to Python. What it lacks is a missing symbol when the
// library is loaded.
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <algorithm>
#include <vector>

#include "driver.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fakecuda {

Driver driver;
int devices = 1, current_device = 0, tensors_device = 0;

namespace {

struct Function {
  const void* function;  // the host's stand-in for the kernel, by whose address it is launched
  const char* name;      // the kernel's, mangled
  const void* fatbin;    // its code for the architectures that it was compiled for
};
std::vector<Function>& functions() {
  static std::vector<Function> all;
  return all;
}

// The latest error stays until it is read; one that has broken the device stays for good.
thread_local cudaError_t last = cudaSuccess;
cudaError_t broken = cudaSuccess;

cudaError_t result(int code) {
  const cudaError_t error = broken != cudaSuccess ? broken : static_cast<cudaError_t>(code);
  if (error == cudaErrorLaunchFailure) broken = error;
  if (error != cudaSuccess) last = error;
  return error;
}

// Asks the driver, unless the device is broken.
template <typename Ask, typename... Arguments>
cudaError_t answer(Ask ask, Arguments... arguments) {
  return result(broken != cudaSuccess ? broken : ask(arguments...));
}

Launch described(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                 void** arguments) {
  return {function, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, 0, -1, shared, stream,
          arguments};
}

Launch described(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  Launch launch = described(function, config.gridDim, config.blockDim, config.dynamicSmemBytes,
                            config.stream, arguments);
  for (const cudaLaunchAttribute* a = config.attrs; a != config.attrs + config.numAttrs; ++a) {
    switch (a->id) {
      case cudaLaunchAttributeIgnore:
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch.overlap = a->val.programmaticStreamSerializationAllowed;
        break;
      default:
        launch.unknown_attribute = a->id;
    }
  }
  return launch;
}

}  // namespace
}  // namespace fakecuda

using namespace fakecuda;

// --- for Python ---

EXPORT void fakecuda_connect(const Driver* by) { driver = *by; }
EXPORT size_t fakecuda_functions(const Function** all) {
  *all = functions().data();
  return functions().size();
}
EXPORT void fakecuda_devices(int count) { devices = count; }
EXPORT void fakecuda_put_tensors_on(int device) { tensors_device = device; }
EXPORT void fakecuda_reset() { last = broken = cudaSuccess; }

// --- what nvcc's host code calls before main and in the kernels' stand-ins ---

EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  const auto* data = static_cast<__fatBinC_Wrapper_t*>(wrapper)->data;
  return reinterpret_cast<void**>(const_cast<unsigned long long*>(data));
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void** fatbin, const char* function, char*, const char* name,
                                   int, uint3*, uint3*, dim3*, dim3*, int*) {
  functions().push_back({function, name, fatbin});
}

namespace {
thread_local fakecuda::Launch configured;  // by <<<...>>>
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            cudaStream_t stream) {
  configured = described(nullptr, grid, block, shared, stream, nullptr);
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                              void* stream) {
  *grid = {configured.grid[0], configured.grid[1], configured.grid[2]};
  *block = {configured.block[0], configured.block[1], configured.block[2]};
  *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                      size_t shared, cudaStream_t stream) {
  const Launch launch = described(kernel, grid, block, shared, stream, arguments);
  return answer(driver.launch, &launch);
}

// --- the runtime's interface, as far as the launchers use it ---

EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  const Launch launch = described(function, grid, block, shared, stream, arguments);
  return answer(driver.launch, &launch);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                       void** arguments) {
  const Launch launch = described(function, *config, arguments);
  return answer(driver.launch, &launch);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                        int value) {
  return answer(driver.set_function_attribute, function, attribute, value);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  FunctionAttributes found{};
  const cudaError_t error = answer(driver.function_attributes, function, &found);
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = found.architecture;
  attributes->sharedSizeBytes = found.static_shared;
  attributes->maxDynamicSharedSizeBytes = found.most_dynamic_shared;
  attributes->maxThreadsPerBlock = found.most_threads;
  return error;
}
EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = devices, result(cudaSuccess); }
EXPORT cudaError_t cudaGetDevice(int* device) {
  return *device = current_device, result(cudaSuccess);
}
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices) return result(cudaErrorInvalidDevice);
  return current_device = device, result(cudaSuccess);
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = broken;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unrecognized error code";
  }
}
