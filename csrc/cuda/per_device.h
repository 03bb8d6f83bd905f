// What is looked up once for each device.
#pragma once

#include <mutex>
#include <optional>
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

}  // namespace scse::cuda
