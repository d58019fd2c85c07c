// cuDevice*: what a process sees of the devices.

#include <cstdio>
#include <cstring>
#include <map>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

std::string bus_id(int physical) {
  char text[16];
  std::snprintf(text, sizeof text, "0000:%02X:00.0", 0x10 + physical);
  return text;
}

std::optional<int> attribute(const DeviceSettings& device, int physical, CUdevice_attribute which) {
  const std::map<CUdevice_attribute, int> values{
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 0x7fff'ffff},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 4},
      {CU_DEVICE_ATTRIBUTE_INTEGRATED, 0},
      {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, device.compute_mode},
      {CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, 0x10 + physical},
      {CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, 0},
      {CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, 0},
      {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 2},
      {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device.capability / 10},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device.capability % 10},
      {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
      {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
      {CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS, 0},
      {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1},
      {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
      {CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES, 0},
      {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device.vmm ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device.vmm ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED, device.read_only_register ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device.pools ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, device.ipc ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, 0}};
  const auto found = values.find(which);
  return found == values.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace

CUresult device_get(CUdevice* device, int ordinal) {
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!driver().physical_of(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult device_get_count(int* count) {
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *count = static_cast<int>(driver().configuration.visible.size());
  return CUDA_SUCCESS;
}

CUresult device_get_name(char* name, int bytes, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  if (name == nullptr || bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
  std::snprintf(name, static_cast<std::size_t>(bytes), "Fake GPU %d", *physical);
  return CUDA_SUCCESS;
}

CUresult device_get_uuid(CUuuid* uuid, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  if (uuid == nullptr) return CUDA_ERROR_INVALID_VALUE;
  unsigned char bytes[16];
  device_uuid(*physical, bytes);
  std::memcpy(uuid->bytes, bytes, sizeof bytes);
  return CUDA_SUCCESS;
}

CUresult device_get_attribute(int* value, CUdevice_attribute which, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  const auto known = attribute(driver().device(*physical), *physical, which);
  if (value == nullptr || !known) return CUDA_ERROR_INVALID_VALUE;
  *value = *known;
  return CUDA_SUCCESS;
}

CUresult device_total_mem(std::size_t* bytes, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *bytes = driver().device(*physical).memory_bytes;
  return CUDA_SUCCESS;
}

CUresult device_get_pci_bus_id(char* text, int bytes, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  const std::string id = bus_id(*physical);
  if (text == nullptr || bytes <= static_cast<int>(id.size())) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(text, id.c_str(), id.size() + 1);
  return CUDA_SUCCESS;
}

CUresult device_get_by_pci_bus_id(CUdevice* device, const char* text) {
  if (device == nullptr || text == nullptr) return CUDA_ERROR_INVALID_VALUE;
  for (const int physical : driver().configuration.visible) {
    if (bus_id(physical) != text) continue;
    *device = driver().ordinal_of(physical);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_DEVICE;
}

CUresult device_can_access_peer(int* can, CUdevice device, CUdevice peer) {
  const auto from = driver().physical_of(device);
  const auto to = driver().physical_of(peer);
  if (!from || !to) return CUDA_ERROR_INVALID_DEVICE;
  if (can == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *can = from != to && driver().device(*from).peers && driver().device(*to).peers ? 1 : 0;
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
