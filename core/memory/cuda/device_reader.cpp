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

std::span<std::byte> DeviceReader::half(std::uint64_t chunk) const noexcept {
  const std::uint64_t size = std::min(chunk_bytes_, bytes_ - chunk * chunk_bytes_);
  const std::uint64_t index = test_point("fence.digest_swap") ? 0 : chunk % 2;
  return buffer_.subspan(index * chunk_bytes_, size);
}

template <typename Body>
Result<void> DeviceReader::drive(Body&& body) {
  const auto what = [this](const char* call) {
    return "reading " + context_->device().label() + " (" + call + ")";
  };
  if (broken_ != CUDA_SUCCESS) return fail_cuda(driver_, what("after one that failed"), broken_);
  const auto current = Current::enter(*context_);
  CUresult code = current ? CUDA_SUCCESS : static_cast<CUresult>(current.error().native);
  const char* const failed = current ? body(code) : "cuCtxPushCurrent";
  if (failed == nullptr) return {};
  chunks_ = handed_out_ = begun_ = 0;
  // The buffer is used again: nothing may write to it any more.
  if (current && driver_.stream_synchronize(stream_) != CUDA_SUCCESS) broken_ = code;
  if (is_sticky(code)) broken_ = code;
  return fail_cuda(driver_, what(failed), code);
}

const char* DeviceReader::copy_next(CUresult& code) noexcept {
  const std::span<std::byte> to = half(begun_);
  code = driver_.memcpy_async(reinterpret_cast<CUdeviceptr>(to.data()),
                              address_ + begun_ * chunk_bytes_, to.size(), stream_);
  if (code != CUDA_SUCCESS) return "cuMemcpyAsync";
  code = driver_.event_record(copied_[begun_ % 2], stream_);
  ++begun_;
  return code != CUDA_SUCCESS ? "cuEventRecord" : nullptr;
}

Result<void> DeviceReader::begin(CUdeviceptr address, std::uint64_t bytes) {
  REFIT_TRY(stop());
  return drive([&](CUresult& code) -> const char* {
    address_ = address;
    bytes_ = bytes;
    chunks_ = bytes / chunk_bytes_ + (bytes % chunk_bytes_ != 0 ? 1 : 0);
    return chunks_ > 0 ? copy_next(code) : nullptr;
  });
}

Result<std::span<const std::byte>> DeviceReader::next() {
  if (handed_out_ == chunks_) return std::span<const std::byte>{};
  REFIT_TRY(drive([&](CUresult& code) -> const char* {
    // Into the half that was handed out before this one.
    if (begun_ < chunks_) {
      if (const char* const failed = copy_next(code)) return failed;
    }
    if (!test_point("fence.digest_chunk"))
      code = driver_.event_synchronize(copied_[handed_out_ % 2]);
    return code != CUDA_SUCCESS ? "cuEventSynchronize" : nullptr;
  }));
  return half(handed_out_++);
}

Result<void> DeviceReader::stop() {
  const bool copying = begun_ > handed_out_;
  chunks_ = handed_out_ = begun_ = 0;
  if (!copying || test_point("fence.digest_stop")) return {};
  return drive([&](CUresult& code) -> const char* {
    code = driver_.stream_synchronize(stream_);
    return code != CUDA_SUCCESS ? "cuStreamSynchronize" : nullptr;
  });
}

}  // namespace refit::cuda
