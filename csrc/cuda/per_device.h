// What is looked up, or done, once for each device.
#pragma once

#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace scse::cuda {

template <typename T>
class PerDevice {
 public:
  // What `lookup` returned when `device` was first asked for.
  template <typename Lookup>
  T get(int device, const Lookup& lookup) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (known_.size() <= static_cast<size_t>(device)) known_.resize(device + 1);
    if (!known_[device]) known_[device] = lookup();
    return *known_[device];
  }

 private:
  std::mutex mutex_;
  std::vector<std::optional<T>> known_;
};

// For each kernel on each device.
class OncePerKernel {
 public:
  // Calls body() unless it has been called for this kernel and device, and hasn't thrown.
  template <typename Body>
  void run(const void* kernel, int device, const Body& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::pair key(device, kernel);
    if (done_.count(key)) return;
    body();
    done_.insert(key);
  }

 private:
  std::mutex mutex_;
  std::set<std::pair<int, const void*>> done_;
};

}  // namespace scse::cuda
