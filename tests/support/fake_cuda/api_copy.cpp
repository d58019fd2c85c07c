// Copies and fills.

#include <algorithm>
#include <cstring>
#include <vector>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

enum class Place { refused, known, pageable };

std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

/// Checks one end of a copy when it is asked for. It is checked again when it runs.
Place look_at(std::uint64_t address, std::uint64_t bytes, bool write, int device) {
  Driver& driver = fakecuda::driver();
  // Memory that CUDA knows nothing of is taken to be the host's.
  if (address + bytes >= address && driver.ranges.overlapping(address, bytes) == nullptr &&
      !driver.arena.contains(address))
    return Place::pageable;
  const auto complaint = driver.ranges.complaint(address, bytes, write, device);
  if (!complaint) return Place::known;
  driver.violation(*complaint);
  return Place::refused;
}

std::shared_ptr<const std::vector<std::byte>> read_now(std::uint64_t address, std::uint64_t bytes,
                                                       Place place, int device) {
  ++driver().last_access;
  const auto* from = place == Place::pageable
                         ? reinterpret_cast<const std::byte*>(address)
                         : driver().touch(address, bytes, /*write=*/false, device);
  if (from == nullptr) return nullptr;
  return std::make_shared<const std::vector<std::byte>>(from, from + bytes);
}

/// What a copy does that blocks, to or from any memory.
CUresult copy_now(std::uint64_t to, std::uint64_t from, std::uint64_t bytes, Context* context) {
  Driver& driver = fakecuda::driver();
  if (bytes == 0) return CUDA_SUCCESS;
  const Place to_place = look_at(to, bytes, /*write=*/true, context->device);
  const Place from_place = look_at(from, bytes, /*write=*/false, context->device);
  if (to_place == Place::refused || from_place == Place::refused) return CUDA_ERROR_INVALID_VALUE;
  const auto early = read_now(from, bytes, from_place, context->device);
  if (early == nullptr) return driver.sticky;
  if (to_place == Place::pageable) {
    std::memcpy(reinterpret_cast<void*>(to), early->data(), bytes);
  } else {
    driver.engine.run_now(context, Copy{{{to, from, bytes, early}}});
  }
  return driver.surface();
}

CUresult copy_and_wait(std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
  Driver& driver = fakecuda::driver();
  // It goes to the NULL stream, which waits for the streams that do not opt out, and only those.
  driver.engine.finish_all(Driver::current(), /*blocking_only=*/true);
  const CUresult earlier = driver.surface();
  return earlier != CUDA_SUCCESS ? earlier : copy_now(to, from, bytes, Driver::current());
}

CUresult copy_later(CUstream handle, std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
  Driver& driver = fakecuda::driver();
  const auto stream = driver.usable_stream(handle);
  if (!stream) return stream.error();
  if (bytes == 0) return CUDA_SUCCESS;
  const int device = (*stream)->context->device;
  const Place to_place = look_at(to, bytes, /*write=*/true, device);
  const Place from_place = look_at(from, bytes, /*write=*/false, device);
  if (to_place == Place::refused || from_place == Place::refused) return CUDA_ERROR_INVALID_VALUE;
  if (to_place == Place::known && from_place == Place::known) {
    driver.engine.enqueue(**stream, Copy{{{to, from, bytes, nullptr}}});
    return CUDA_SUCCESS;
  }
  driver.violation(text("an asynchronous copy of pageable host memory at ",
                        Hex{to_place == Place::pageable ? to : from}));
  driver.engine.finish(*stream);
  return copy_now(to, from, bytes, (*stream)->context);
}

struct Batch {
  const CUdeviceptr* to;
  const CUdeviceptr* from;
  const std::size_t* bytes;
  std::size_t count;
  const CUmemcpyAttributes* attributes;
  const std::size_t* first_of_attributes;
  std::size_t attribute_count;
};

bool has_good_attributes(const Batch& batch) {
  if (batch.attributes == nullptr || batch.first_of_attributes == nullptr ||
      batch.attribute_count == 0 || batch.attribute_count > batch.count ||
      batch.first_of_attributes[0] != 0)
    return false;
  for (std::size_t i = 0; i < batch.attribute_count; ++i) {
    const std::size_t first = batch.first_of_attributes[i];
    if (first >= batch.count || (i > 0 && first <= batch.first_of_attributes[i - 1])) return false;
    const auto order = batch.attributes[i].srcAccessOrder;
    constexpr unsigned int kFlags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    if (order < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || order > CU_MEMCPY_SRC_ACCESS_ORDER_ANY ||
        (batch.attributes[i].flags & ~kFlags) != 0)
      return false;
  }
  return true;
}

/// Copies of a batch have no order, so none may write what another one touches.
void complain_of_overlaps(const std::vector<Transfer>& transfers) {
  struct Interval {
    std::uint64_t begin, end;
    bool write;
  };
  std::vector<Interval> intervals;
  for (const Transfer& transfer : transfers) {
    intervals.push_back({transfer.to, transfer.to + transfer.bytes, true});
    if (!transfer.early)
      intervals.push_back({transfer.from, transfer.from + transfer.bytes, false});
  }
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::uint64_t written_to = 0;
  std::uint64_t touched_to = 0;
  for (const Interval& interval : intervals) {
    if (interval.begin < written_to || (interval.write && interval.begin < touched_to)) {
      driver().violation(
          text("a batch of copies that depend on each other at ", Hex{interval.begin}));
      return;
    }
    touched_to = std::max(touched_to, interval.end);
    if (interval.write) written_to = std::max(written_to, interval.end);
  }
}

CUresult copy_batch(const Batch& batch, CUstream handle, std::size_t* failed) {
  Driver& driver = fakecuda::driver();
  // All bits set: the failure is of no copy in particular.
  if (failed != nullptr) *failed = ~std::size_t{0};
  if (batch.to == nullptr || batch.from == nullptr || batch.bytes == nullptr || batch.count == 0 ||
      !has_good_attributes(batch))
    return CUDA_ERROR_INVALID_VALUE;
  const auto stream = driver.usable_stream(handle);
  if (!stream) return stream.error();
  const int device = (*stream)->context->device;
  Copy copy;
  std::size_t attribute = 0;
  for (std::size_t i = 0; i < batch.count; ++i) {
    if (attribute + 1 < batch.attribute_count && batch.first_of_attributes[attribute + 1] == i)
      ++attribute;
    const auto order = batch.attributes[attribute].srcAccessOrder;
    Transfer transfer{batch.to[i], batch.from[i], batch.bytes[i], nullptr};
    if (transfer.bytes == 0) continue;
    const Place to = look_at(transfer.to, transfer.bytes, /*write=*/true, device);
    const Place from = look_at(transfer.from, transfer.bytes, /*write=*/false, device);
    if (to != Place::known || from == Place::refused) {
      if (to == Place::pageable)
        driver.violation(text("a batch of copies to pageable host memory at ", Hex{transfer.to}));
      if (failed != nullptr) *failed = i;
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (from == Place::pageable && order == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
      driver.violation(text("a batch of copies in stream order of pageable host memory at ",
                            Hex{transfer.from}));
    // ANY may mean now: who gives it must have nothing in the stream that still writes there.
    const bool now = from == Place::pageable ||
                     order == CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL ||
                     (order == CU_MEMCPY_SRC_ACCESS_ORDER_ANY &&
                      driver.draw("source access", ++driver.last_choice).below(2) == 0);
    if (now) transfer.early = read_now(transfer.from, transfer.bytes, from, device);
    if (driver.sticky != CUDA_SUCCESS) return driver.sticky;
    copy.transfers.push_back(std::move(transfer));
  }
  complain_of_overlaps(copy.transfers);
  driver.engine.enqueue(**stream, std::move(copy));
  return CUDA_SUCCESS;
}

/// Where a side of a 2D copy begins; nothing if it is no memory that can be addressed.
std::optional<std::uint64_t> begin_of(CUmemorytype type, const void* host, CUdeviceptr device,
                                      std::size_t pitch, std::size_t x, std::size_t y) {
  if (type == CU_MEMORYTYPE_HOST) return address_of(host) + y * pitch + x;
  if (type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_UNIFIED) return device + y * pitch + x;
  return std::nullopt;
}

}  // namespace

tl::expected<std::shared_ptr<Stream>, CUresult> Driver::usable_stream(CUstream handle) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
    violation("work for the NULL stream, which waits for all others");
    return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  }
  auto stream = streams.find(handle);
  if (stream == nullptr) {
    violation(text("work for ", Hex{Handles<CUstream, Stream>::to_value(handle)},
                   ", which is no stream or was destroyed"));
    return tl::unexpected(CUDA_ERROR_INVALID_HANDLE);
  }
  if (stream->context != current()) {
    violation("work for a stream of another context than the current one");
    return tl::unexpected(one_of({CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_INVALID_CONTEXT}));
  }
  return stream;
}

CUresult memcpy_async(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  return copy_later(stream, to, from, bytes);
}

CUresult memcpy_to_device_async(CUdeviceptr to, const void* from, std::size_t bytes,
                                CUstream stream) {
  return copy_later(stream, to, address_of(from), bytes);
}

CUresult memcpy_to_host_async(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  return copy_later(stream, address_of(to), from, bytes);
}

CUresult memcpy_peer_async(CUdeviceptr to, CUcontext to_context, CUdeviceptr from,
                           CUcontext from_context, std::size_t bytes, CUstream stream) {
  if (driver().find_context(to_context) == nullptr ||
      driver().find_context(from_context) == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  return copy_later(stream, to, from, bytes);
}

CUresult memcpy_2d_async(const CUDA_MEMCPY2D_v2* given, CUstream handle) {
  Driver& driver = fakecuda::driver();
  if (given == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto to = begin_of(given->dstMemoryType, given->dstHost, given->dstDevice, given->dstPitch,
                           given->dstXInBytes, given->dstY);
  const auto from = begin_of(given->srcMemoryType, given->srcHost, given->srcDevice,
                             given->srcPitch, given->srcXInBytes, given->srcY);
  const bool pitches =
      given->Height <= 1 || (given->dstPitch >= given->WidthInBytes + given->dstXInBytes &&
                             given->srcPitch >= given->WidthInBytes + given->srcXInBytes);
  if (!to || !from || !pitches) return CUDA_ERROR_INVALID_VALUE;
  const auto stream = driver.usable_stream(handle);
  if (!stream) return stream.error();
  Copy copy;
  for (std::size_t row = 0; row < given->Height && given->WidthInBytes > 0; ++row) {
    Transfer transfer{*to + row * given->dstPitch, *from + row * given->srcPitch,
                      given->WidthInBytes, nullptr};
    const int device = (*stream)->context->device;
    if (look_at(transfer.to, transfer.bytes, /*write=*/true, device) != Place::known ||
        look_at(transfer.from, transfer.bytes, /*write=*/false, device) != Place::known) {
      driver.violation("a 2D copy of memory that is neither pinned nor a device's");
      return CUDA_ERROR_INVALID_VALUE;
    }
    copy.transfers.push_back(std::move(transfer));
  }
  driver.engine.enqueue(**stream, std::move(copy));
  return CUDA_SUCCESS;
}

CUresult memcpy_batch_async_12080(CUdeviceptr* to, CUdeviceptr* from, std::size_t* bytes,
                                  std::size_t count, CUmemcpyAttributes* attributes,
                                  std::size_t* first_of_attributes, std::size_t attribute_count,
                                  std::size_t* failed, CUstream stream) {
  // Called through the prototype of 13.0, the stream stands where failIdx does.
  if (driver().streams.find(reinterpret_cast<CUstream>(failed)) != nullptr) {
    driver().violation("the 12.8 entry of cuMemcpyBatchAsync was called by the 13.0 prototype");
    return CUDA_ERROR_INVALID_VALUE;
  }
  return copy_batch({to, from, bytes, count, attributes, first_of_attributes, attribute_count},
                    stream, failed);
}

CUresult memcpy_batch_async_13000(CUdeviceptr* to, CUdeviceptr* from, std::size_t* bytes,
                                  std::size_t count, CUmemcpyAttributes* attributes,
                                  std::size_t* first_of_attributes, std::size_t attribute_count,
                                  CUstream stream) {
  return copy_batch({to, from, bytes, count, attributes, first_of_attributes, attribute_count},
                    stream, nullptr);
}

CUresult memset_async(CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream handle) {
  Driver& driver = fakecuda::driver();
  const auto stream = driver.usable_stream(handle);
  if (!stream) return stream.error();
  if (bytes == 0) return CUDA_SUCCESS;
  if (look_at(to, bytes, /*write=*/true, (*stream)->context->device) != Place::known)
    return CUDA_ERROR_INVALID_VALUE;
  driver.engine.enqueue(**stream, Fill{to, bytes, value});
  return CUDA_SUCCESS;
}

CUresult memcpy_to_device(CUdeviceptr to, const void* from, std::size_t bytes) {
  return copy_and_wait(to, address_of(from), bytes);
}

CUresult memcpy_to_host(void* to, CUdeviceptr from, std::size_t bytes) {
  return copy_and_wait(address_of(to), from, bytes);
}

CUresult memcpy_on_device(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  return copy_and_wait(to, from, bytes);
}

}  // namespace fakecuda
