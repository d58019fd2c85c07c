#include "memory/cuda/device_reader.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "test_point.hpp"

namespace refit::cuda {

Result<std::unique_ptr<DeviceReader>> DeviceReader::create(std::shared_ptr<const Context> context,
                                                           std::span<std::byte> buffer) {
  std::unique_ptr<DeviceReader> reader(new DeviceReader(std::move(context), buffer));
  REFIT_TRY(reader->open());
  return reader;
}

DeviceReader::DeviceReader(std::shared_ptr<const Context> context,
                           std::span<std::byte> buffer) noexcept
    : context_(std::move(context)),
      driver_(context_->driver()),
      buffer_(buffer),
      chunk_bytes_(buffer.size() / 2) {
  REFIT_ASSERT(chunk_bytes_ > 0);
}

Result<void> DeviceReader::open() {
  const std::string where = "reading " + context_->device().label();
  REFIT_TRY_ASSIGN(const auto current, Current::enter(*context_));
  REFIT_TRY_CUDA(driver_, stream_create(&stream_, CU_STREAM_NON_BLOCKING),
                 "a stream for " + where + " (cuStreamCreate)");
  for (CUevent& event : copied_) {
    REFIT_TRY_CUDA(driver_, event_create(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC),
                   "an event for " + where + " (cuEventCreate)");
  }
  return {};
}

DeviceReader::~DeviceReader() {
  const auto current = Current::enter(*context_);
  for (CUevent event : copied_) {
    if (event != nullptr) driver_.event_destroy(event);
  }
  if (stream_ != nullptr) driver_.stream_destroy(stream_);
}

Result<void> DeviceReader::read_chunks(CUdeviceptr address, std::uint64_t bytes, TakeChunk take,
                                       void* context) {
  const auto what = [this](const char* call) {
    return "reading " + context_->device().label() + " (" + call + ")";
  };
  if (broken_ != CUDA_SUCCESS) return fail_cuda(driver_, what("after one that failed"), broken_);
  const auto current = Current::enter(*context_);
  CUresult code = current ? CUDA_SUCCESS : static_cast<CUresult>(current.error().native);
  const char* failed = "cuCtxPushCurrent";
  if (current) {
    failed = pump(address, bytes, take, context, code);
    if (failed == nullptr) return {};
    // The buffer is used again: nothing may write to it any more.
    if (driver_.stream_synchronize(stream_) != CUDA_SUCCESS) broken_ = code;
  }
  if (is_sticky(code)) broken_ = code;
  return fail_cuda(driver_, what(failed), code);
}

const char* DeviceReader::pump(CUdeviceptr address, std::uint64_t bytes, TakeChunk take,
                               void* context, CUresult& code) noexcept {
  const std::uint64_t chunks = bytes / chunk_bytes_ + (bytes % chunk_bytes_ != 0 ? 1 : 0);
  const auto half = [&](std::uint64_t chunk) {
    const std::uint64_t size = std::min(chunk_bytes_, bytes - chunk * chunk_bytes_);
    return buffer_.subspan(chunk % 2 * chunk_bytes_, size);
  };
  const auto copy = [&](std::uint64_t chunk) -> const char* {
    const std::span<std::byte> to = half(chunk);
    code = driver_.memcpy_async(reinterpret_cast<CUdeviceptr>(to.data()),
                                address + chunk * chunk_bytes_, to.size(), stream_);
    if (code != CUDA_SUCCESS) return "cuMemcpyAsync";
    code = driver_.event_record(copied_[chunk % 2], stream_);
    return code != CUDA_SUCCESS ? "cuEventRecord" : nullptr;
  };
  for (std::uint64_t chunk = 0; chunk < chunks; ++chunk) {
    const char* failed = chunk == 0 ? copy(0) : nullptr;
    // Into the half that was handed out before this one.
    if (failed == nullptr && chunk + 1 < chunks) failed = copy(chunk + 1);
    if (failed != nullptr) return failed;
    if (!test_point("fence.digest_chunk")) code = driver_.event_synchronize(copied_[chunk % 2]);
    if (code != CUDA_SUCCESS) return "cuEventSynchronize";
    take(context, half(chunk));
  }
  return nullptr;
}

}  // namespace refit::cuda
