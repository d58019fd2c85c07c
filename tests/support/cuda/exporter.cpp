#include "support/cuda/exporter.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "memory/device_sharing.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/must.hpp"

namespace refit::test {
namespace {

constexpr const char* kMark = "REFIT_TEST_CUDA_EXPORTER";  // the fd that it writes to

struct Message {
  DeviceUuid device;
  std::uint64_t allocation = 0;
  std::uint64_t bytes = 0;
  IpcHandle handle{};
  IpcHandle event{};
};

}  // namespace

bool is_exporter() { return std::getenv(kMark) != nullptr; }

void export_until_told() {
  const DeviceAllocation memory(DeviceKind::legacy, 0, 8192);
  const auto shared = must(share_device_memory(memory.pointer(), 8192, "the exporter's memory"));
  const Exported& exported = shared->exported();
  const DevicePiece& piece = exported.pieces.front();
  CUstream stream = nullptr;
  {
    const cuda::Current current(0);
    cuda::must(cuda::Driver::get().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING),
               "cuStreamCreate");
    cuda::must(cuda::Driver::get().cuMemsetD8Async(memory.address(), 1, memory.bytes(), stream),
               "cuMemsetD8Async");
  }
  const auto event = must(share_device_event(memory.pointer(), stream, "the exporter's event"));
  must(event->record());
  const Message message{exported.device, piece.allocation_id, exported.bytes, piece.handle,
                        event->handle()};
  const int to = std::atoi(std::getenv(kMark));
  if (::write(to, &message, sizeof message) != sizeof message) std::_Exit(1);
  for (;;) ::pause();
}

CudaExporter::CudaExporter() : process_(kMark, {{"FAKECUDA_SCHEDULE", "lazy"}}) {
  Message message;
  EXPECT_EQ(::read(process_.from.get(), &message, sizeof message),
            static_cast<ssize_t>(sizeof message));
  event_ = message.event;
  exported_.device = message.device;
  exported_.bytes = message.bytes;
  DevicePiece& piece = exported_.pieces.emplace_back();
  piece.bytes = message.bytes;
  piece.handle = message.handle;
  piece.allocation_id = message.allocation;
}

}  // namespace refit::test
