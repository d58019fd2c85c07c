// Handles: opaque values for objects, never used twice.
//
// A handle that was destroyed is found to be so; a pointer would be reused by the allocator, and a
// stale one would name a stranger.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

namespace fakecuda {

template <typename Handle, typename Object>
class Handles {
 public:
  explicit Handles(std::uint64_t tag) : tag_(tag << 32) {}

  Handle add(std::shared_ptr<Object> object) {
    const std::uint64_t value = tag_ + 16 * ++last_;
    objects_.emplace(value, std::move(object));
    return to_handle(value);
  }
  [[nodiscard]] std::shared_ptr<Object> find(Handle handle) const {
    const auto found = objects_.find(to_value(handle));
    return found == objects_.end() ? nullptr : found->second;
  }
  void remove(Handle handle) { objects_.erase(to_value(handle)); }
  [[nodiscard]] std::size_t size() const { return objects_.size(); }
  template <typename Condition>
  void remove_if(Condition&& condition) {
    std::erase_if(objects_, [&](const auto& entry) { return condition(*entry.second); });
  }
  template <typename Condition>
  [[nodiscard]] std::size_t count_if(Condition&& condition) const {
    std::size_t count = 0;
    for (const auto& [value, object] : objects_)
      if (condition(*object)) ++count;
    return count;
  }

  static Handle to_handle(std::uint64_t value) {
    if constexpr (std::is_pointer_v<Handle>) {
      return reinterpret_cast<Handle>(value);
    } else {
      return value;
    }
  }
  static std::uint64_t to_value(Handle handle) {
    if constexpr (std::is_pointer_v<Handle>) {
      return reinterpret_cast<std::uint64_t>(handle);
    } else {
      return handle;
    }
  }

 private:
  std::uint64_t tag_;
  std::uint64_t last_ = 0;
  std::map<std::uint64_t, std::shared_ptr<Object>> objects_;
};

}  // namespace fakecuda
