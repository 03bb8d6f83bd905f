// CPU tensors that ops.cpp takes for tensors on a CUDA device. The linker puts each function
// __wrap_f here in the place of torch's f (--wrap=f), and __real_f is torch's own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

#include "driver.h"

using namespace fakecuda;

namespace {

constexpr int kNeverWritten = 0xFE;  // gpulab.poison.POISON

void tell_memory(AtenTensorHandle tensor, const void* pointer, bool fresh) {
  int64_t axes, *sizes, *strides, offset, bytes, last = 0;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &axes);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < axes; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const int32_t itemsize = static_cast<int32_t>(aoti_torch_dtype_element_size(dtype));
  const auto begin = reinterpret_cast<uintptr_t>(pointer), storage = begin - offset * itemsize;
  const Memory memory{
      begin, begin + (last + 1) * itemsize, storage, static_cast<uint64_t>(bytes), itemsize, fresh};
  driver.memory(&memory);
}

}  // namespace

extern "C" {

#define WRAP(function, ...)                      \
  AOTITorchError __real_##function(__VA_ARGS__); \
  __attribute__((visibility("hidden"))) AOTITorchError __wrap_##function(__VA_ARGS__)

// The operators, under another name and for CPU tensors.
WRAP(aoti_torch_library_init_impl, const char*, const char*, const char* file, uint32_t line,
     TorchLibraryHandle* library) {
  return __real_aoti_torch_library_init_impl("scse_kernels_emulated", "CPU", file, line, library);
}

// --- where a tensor is ---

WRAP(aoti_torch_get_device_type, AtenTensorHandle, int32_t* type) {
  return *type = aoti_torch_device_type_cuda(), AOTI_TORCH_SUCCESS;
}
WRAP(aoti_torch_get_device_index, AtenTensorHandle, int32_t* index) {
  return *index = tensors_device, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  return *stream = stream_of(device), AOTI_TORCH_SUCCESS;
}
WRAP(aoti_torch_create_device_guard, int32_t device, DeviceGuardHandle* guard) {
  driver.new_call();
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(current_device));
  return current_device = device, AOTI_TORCH_SUCCESS;
}
WRAP(aoti_torch_delete_device_guard, DeviceGuardHandle guard) {
  const int* before = reinterpret_cast<int*>(guard);
  current_device = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}

// --- memory ---

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
WRAP(aoti_torch_empty_strided, int64_t axes, const int64_t* sizes, const int64_t* strides,
     int32_t dtype, int32_t device_type, int32_t device, AtenTensorHandle* tensor) {
  if (device_type != aoti_torch_device_type_cuda() || device != tensors_device) {
    return AOTI_TORCH_FAILURE;
  }
  const AOTITorchError error = __real_aoti_torch_empty_strided(
      axes, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, tensor);
  if (error != AOTI_TORCH_SUCCESS) return error;
  void* pointer;
  int64_t bytes;
  aoti_torch_get_storage_size(*tensor, &bytes);
  __real_torch_get_mutable_data_ptr(*tensor, &pointer);
  if (bytes > 0) std::memset(pointer, kNeverWritten, bytes);
  tell_memory(*tensor, pointer, true);
  return error;
}

WRAP(torch_get_mutable_data_ptr, AtenTensorHandle tensor, void** pointer) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, pointer);
  tell_memory(tensor, *pointer, false);
  return error;
}
WRAP(torch_get_const_data_ptr, AtenTensorHandle tensor, const void** pointer) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, pointer);
  tell_memory(tensor, *pointer, false);
  return error;
}
WRAP(aoti_torch_get_data_ptr, AtenTensorHandle tensor, void** pointer) {
  const AOTITorchError error = __real_aoti_torch_get_data_ptr(tensor, pointer);
  tell_memory(tensor, *pointer, false);
  return error;
}
}
