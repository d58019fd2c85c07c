// The daemon's devices, by CUDA: what stands behind memory/devices.hpp.
#include "memory/devices.hpp"

#include <algorithm>
#include <mutex>
#include <utility>

#include "memory/cuda/device.hpp"
#include "memory/cuda/device_copier.hpp"
#include "memory/cuda/device_reader.hpp"
#include "memory/cuda/event.hpp"
#include "memory/cuda/import.hpp"
#include "memory/cuda/pinned.hpp"

namespace refit::cuda {
namespace {

/// Of a reader: two chunks. Each thread that hashes has two readers on each device.
constexpr std::size_t kReadBytes = std::size_t{4} << 20;

std::byte* pointer_of(CUdeviceptr address) noexcept {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are numbers
  return reinterpret_cast<std::byte*>(address);
}
CUdeviceptr address_of(const std::byte* pointer) noexcept {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

class ImportedRange final : public DeviceRange {
 public:
  explicit ImportedRange(std::shared_ptr<const DeviceMemory> memory)
      : DeviceRange(pointer_of(memory->address), memory->bytes, memory->context->device().ordinal),
        memory_(std::move(memory)) {}

 private:
  std::shared_ptr<const DeviceMemory> memory_;
};

class Pinned final : public PinnedMemory {
 public:
  explicit Pinned(PinnedRange range) : range_(std::move(range)) {}

 private:
  PinnedRange range_;
};

class OpenedEvent final : public DeviceEvent {
 public:
  OpenedEvent(IpcEvent event, std::string label)
      : event_(std::move(event)), label_(std::move(label)) {}
  [[nodiscard]] CUevent get() const noexcept { return event_.get(); }
  [[nodiscard]] Result<bool> passed() const override { return event_.passed(label_); }

 private:
  IpcEvent event_;
  std::string label_;
};

CUevent event_of(const DeviceEvent* event) noexcept {
  return event == nullptr ? nullptr : static_cast<const OpenedEvent*>(event)->get();
}

class Job final : public DeviceJob {
 public:
  Result<void> prepare(DeviceCopier& copier, std::span<const DeviceOp> ops) {
    std::vector<DeviceCopyOp> wanted;
    wanted.reserve(ops.size());
    for (const DeviceOp& op : ops) {
      wanted.push_back({{address_of(op.copy.source), op.source_device},
                        {address_of(op.copy.target), op.target_device},
                        op.copy.run_bytes,
                        op.copy.loop_count,
                        op.copy.loops,
                        op.part,
                        op.copy.cast});
    }
    return job_.prepare(copier, wanted);
  }

  void place(std::span<std::byte* const> bases) noexcept override { job_.place(bases); }
  [[nodiscard]] bool idle() const noexcept override { return job_.idle(); }
  void arm(const DeviceEvent* source, const DeviceEvent* engine, Done done,
           void* context) noexcept override {
    Fences fences;
    fences.source[0] = event_of(source);
    fences.engine[0] = event_of(engine);
    job_.wait_for(fences);
    done_ = done;
    context_ = context;
    job_.on_done(
        [](void* self, DeviceCopyOutcome outcome) {
          const auto& job = *static_cast<Job*>(self);
          job.done_(job.context_, {static_cast<int>(outcome.code), outcome.call, outcome.sticky,
                                   outcome.untouched});
        },
        this);
  }
  [[nodiscard]] DeviceCopyJob& job() noexcept { return job_; }

 private:
  DeviceCopyJob job_;
  Done done_ = nullptr;
  void* context_ = nullptr;
};

class CudaDevices final : public refit::Devices {
 public:
  CudaDevices(std::shared_ptr<VisibleDevices> devices, std::unique_ptr<DeviceCopier> copier,
              bool legacy_across_uids)
      : devices_(std::move(devices)),
        importer_(devices_, legacy_across_uids),
        copier_(std::move(copier)) {}

  Result<std::shared_ptr<DeviceRange>> import(const Exporter& exporter, const Exported& exported,
                                              Access access, const std::string& label) override {
    REFIT_TRY_ASSIGN(auto memory, importer_.open(exporter, exported, access, label));
    return std::static_pointer_cast<DeviceRange>(
        std::make_shared<ImportedRange>(std::move(memory)));
  }

  Result<std::shared_ptr<PinnedMemory>> pin(const Mapping& mapping, Access access,
                                            const std::string& label) override {
    // Portable: pinned for every device, by whichever one.
    REFIT_TRY_ASSIGN(auto context, devices_->context(devices_->all().front()));
    REFIT_TRY_ASSIGN(auto range, PinnedRange::pin(std::move(context), mapping.data(),
                                                  mapping.bytes(), access, label));
    return std::static_pointer_cast<PinnedMemory>(std::make_shared<Pinned>(std::move(range)));
  }

  Result<std::shared_ptr<DeviceEvent>> open_event(const DeviceUuid& uuid, const IpcHandle& handle,
                                                  const std::string& label) override {
    const Device* device = devices_->find(uuid);
    if (device == nullptr) {
      return fail(Errc::bad_region, label + ": its event is of device " + uuid.text() +
                                        ", which this daemon does not see");
    }
    REFIT_TRY_ASSIGN(auto context, devices_->context(*device));
    REFIT_TRY_ASSIGN(auto event, IpcEvent::open(std::move(context), handle, label));
    return std::static_pointer_cast<DeviceEvent>(
        std::make_shared<OpenedEvent>(std::move(event), label));
  }

  Result<std::unique_ptr<DeviceJob>> prepare(std::span<const DeviceOp> ops) override {
    auto job = std::make_unique<Job>();
    REFIT_TRY(job->prepare(*copier_, ops));
    return std::unique_ptr<DeviceJob>(std::move(job));
  }

  void submit(std::span<DeviceJob* const> jobs) noexcept override {
    submitted_.clear();
    for (DeviceJob* job : jobs) submitted_.push_back(&static_cast<Job*>(job)->job());
    copier_->submit(submitted_);
  }

  Result<std::unique_ptr<DeviceReading>> read(const DeviceRange& range, std::uint64_t begin,
                                              std::uint64_t bytes) override {
    REFIT_TRY_ASSIGN(auto reader, take_reader(range.device()));
    auto reading = std::make_unique<Reading>(*this, std::move(reader));
    REFIT_TRY(reading->begin(address_of(range.address()) + begin, bytes));
    return std::unique_ptr<DeviceReading>(std::move(reading));
  }

  [[nodiscard]] WorkerReading read_worker() noexcept override { return copier_->read_worker(); }

 private:
  /// A reader and its pinned memory; one for each reading at a time.
  struct Reader {
    int device = 0;
    std::unique_ptr<PinnedBuffer> memory;
    std::unique_ptr<DeviceReader> reader;
  };

  /// What takes a reader, and gives it back unless it failed.
  class Reading final : public DeviceReading {
   public:
    Reading(CudaDevices& owner, std::unique_ptr<Reader> reader)
        : owner_(owner), reader_(std::move(reader)) {}
    ~Reading() override {
      if (reader_ != nullptr && reader_->reader->stop()) owner_.give_back(std::move(reader_));
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    Result<void> begin(CUdeviceptr address, std::uint64_t bytes) {
      return kept(reader_->reader->begin(address, bytes));
    }
    Result<std::span<const std::byte>> next() override { return kept(reader_->reader->next()); }

   private:
    template <typename Outcome>
    Outcome kept(Outcome outcome) {
      if (!outcome) reader_.reset();
      return outcome;
    }
    CudaDevices& owner_;
    std::unique_ptr<Reader> reader_;
  };

  void give_back(std::unique_ptr<Reader> reader) {
    const std::lock_guard lock(mutex_);
    readers_.push_back(std::move(reader));
  }

  Result<std::unique_ptr<Reader>> take_reader(int ordinal) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = std::find_if(readers_.begin(), readers_.end(),
                                      [&](const auto& one) { return one->device == ordinal; });
      if (found != readers_.end()) {
        auto reader = std::move(*found);
        readers_.erase(found);
        return reader;
      }
    }
    const Device* device = devices_->find(static_cast<CUdevice>(ordinal));
    REFIT_ASSERT(device != nullptr);
    REFIT_TRY_ASSIGN(auto context, devices_->context(*device));
    auto reader = std::make_unique<Reader>();
    reader->device = ordinal;
    REFIT_TRY_ASSIGN(
        reader->memory,
        PinnedBuffer::allocate(context, kReadBytes, "the memory that digests read through"));
    REFIT_TRY_ASSIGN(reader->reader,
                     DeviceReader::create(context, {reader->memory->data(), kReadBytes}));
    return reader;
  }

  std::shared_ptr<VisibleDevices> devices_;
  std::mutex mutex_;
  Importer importer_;
  std::vector<std::unique_ptr<Reader>> readers_;  ///< that nobody uses; guarded by mutex_
  std::unique_ptr<DeviceCopier> copier_;
  std::vector<DeviceCopyJob*> submitted_;  ///< of submit() alone, which keeps its memory
};

}  // namespace
}  // namespace refit::cuda

namespace refit {

Result<std::unique_ptr<Devices>> Devices::create(const DeviceOptions& options) {
  REFIT_TRY_ASSIGN(auto devices, cuda::VisibleDevices::open());
  REFIT_TRY_ASSIGN(auto copier, cuda::DeviceCopier::create(devices));
  return std::unique_ptr<Devices>(std::make_unique<cuda::CudaDevices>(
      std::move(devices), std::move(copier), options.legacy_across_uids));
}

bool Devices::is_lost(const Error& error) noexcept {
  return error.code == Errc::cuda && cuda::is_sticky(static_cast<CUresult>(error.native));
}

}  // namespace refit
