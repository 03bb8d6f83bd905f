// What the fake runtime and the fake device tensors ask of Python: driver.py has the same layouts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fakecuda {

struct Launch {
  const void* function;  // as registered
  uint32_t grid[3], block[3];
  int32_t overlap;            // programmatic stream serialization
  int32_t unknown_attribute;  // the id of one that runtime.cpp doesn't know, -1: none
  uint64_t shared;            // bytes of dynamic shared memory
  void* stream;
  void** arguments;  // the address of each parameter
};

// Memory that a kernel may be given a pointer to: what a tensor extends over.
struct Memory {
  uintptr_t begin, end;
  uintptr_t storage;  // where its allocation begins
  uint64_t storage_bytes;
  int32_t itemsize;
  int32_t fresh;  // the operators have just allocated it: nobody has written to it
};

struct FunctionAttributes {
  int32_t architecture, static_shared, most_dynamic_shared, most_threads;
};

// Each returns a cudaError_t.
struct Driver {
  int (*launch)(const Launch*);
  int (*set_function_attribute)(const void* function, int attribute, int value);
  int (*function_attributes)(const void* function, FunctionAttributes*);
  int (*memory)(const Memory*);
  int (*new_call)();  // an operator begins: the memory that earlier ones knew may be gone
};

extern Driver driver;
extern int devices, current_device, tensors_device;

inline void* stream_of(int device) { return reinterpret_cast<void*>(0x1000 + intptr_t{device}); }

}  // namespace fakecuda
