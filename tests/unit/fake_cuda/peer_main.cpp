// The other process of these tests; peer.hpp is its other end.
//
//   serve UID            answers questions on fd 3 until it closes
//   clean|leak|misuse|lose-work|read-device-memory|fork|lost|kernel
//                        does that one thing with the driver, and ends with 0 if it can

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "unit/fake_cuda/fatbin.hpp"
#include "unit/fake_cuda/peer.hpp"
#include "unit/fake_cuda/refit.hpp"

namespace fakecuda::test {
namespace {

class Served {
 public:
  ~Served() {
    if (started_) cuda().cuDevicePrimaryCtxRelease(device_);
  }

  Answer act(const Question& question, int fd, int& fd_back) {
    Answer answer;
    ::setenv("FAKECUDA_SEED", std::to_string(question.number).c_str(), 1);
    ::setenv("FAKECUDA_SCHEDULE", question.schedule, 1);
    switch (question.order) {
      case Order::resolve:
        answer = resolve(question);
        break;
      case Order::device_count: {
        int count = -1;
        answer.result = cuda().cuInit(0);
        cuda().cuDeviceGetCount(&count);
        answer.value = static_cast<std::uint64_t>(count);
        break;
      }
      case Order::retain:
        answer.result = begin(static_cast<int>(question.number));
        break;
      case Order::open_memory:
        begin();
        answer.result =
            cuda().cuIpcOpenMemHandle(&kept_, question.memory, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
        break;
      case Order::open_event:
        begin();
        answer.result = cuda().cuIpcOpenEventHandle(&event_, question.event);
        break;
      case Order::import_fd:
        begin();
        answer.result = import(fd, question.bytes);
        break;
      case Order::read_kept: {
        unsigned char byte = 0;
        answer.result = cuda().cuMemcpyDtoH(&byte, kept_, 1);
        answer.value = byte;
        break;
      }
      case Order::close_kept:
        answer.result = close_kept();
        break;
      case Order::wait_event:
        answer.result = cuda().cuEventSynchronize(event_);
        break;
      case Order::export_both:
        begin();
        answer.result = export_both(question.bytes, answer, fd_back);
        break;
      case Order::record:
        answer.result = cuda().cuMemsetD8Async(kept_, static_cast<unsigned char>(question.number),
                                               bytes_, stream_);
        cuda().cuEventRecord(event_, stream_);
        break;
      case Order::free_export:
        cuda().cuMemRelease(physical_);
        cuda().cuStreamDestroy(stream_);
        cuda().cuEventDestroy(event_);
        answer.result = cuda().cuMemFree(kept_);
        break;
      case Order::refit:
        begin();
        cuda().control.reload();
        answer.value = refit(question, fd, answer.result) ? 1 : 0;
        break;
    }
    if (started_) answer.violations = cuda().control.gauge("violations");
    return answer;
  }

 private:
  CUresult begin(int device = 0) {
    if (started_) return CUDA_SUCCESS;
    CUresult result = cuda().cuInit(0);
    CUcontext context = nullptr;
    if (result == CUDA_SUCCESS) result = cuda().cuDevicePrimaryCtxRetain(&context, device);
    if (result == CUDA_SUCCESS) result = cuda().cuCtxPushCurrent(context);
    started_ = result == CUDA_SUCCESS;
    device_ = device;
    return result;
  }

  static Answer resolve(const Question& question) {
    Answer answer;
    void* function = nullptr;
    CUdriverProcAddressQueryResult status{};
    answer.result = cuda().resolve(question.text, &function, static_cast<int>(question.number),
                                   CU_GET_PROC_ADDRESS_DEFAULT, &status);
    answer.value = static_cast<std::uint64_t>(status);
    if ((function != nullptr) != (status == CU_GET_PROC_ADDRESS_SUCCESS)) answer.value = ~0ULL;
    return answer;
  }

  CUresult import(int fd, std::uint64_t bytes) {
    CUmemGenericAllocationHandle handle = 0;
    CUresult result = cuda().cuMemImportFromShareableHandle(
        &handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (result != CUDA_SUCCESS) return result;
    cuda().cuMemAddressReserve(&kept_, bytes, 0, 0, 0);
    result = cuda().cuMemMap(kept_, bytes, 0, handle, 0);
    cuda().cuMemRelease(handle);
    if (result != CUDA_SUCCESS) {
      cuda().cuMemAddressFree(kept_, bytes);
      return result;
    }
    mapped_ = bytes;
    CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READ};
    return cuda().cuMemSetAccess(kept_, bytes, &access, 1);
  }

  CUresult close_kept() {
    if (mapped_ == 0) return cuda().cuIpcCloseMemHandle(kept_);
    cuda().cuMemUnmap(kept_, mapped_);
    const CUresult result = cuda().cuMemAddressFree(kept_, mapped_);
    mapped_ = 0;
    return result;
  }

  CUresult export_both(std::uint64_t bytes, Answer& answer, int& fd) {
    bytes_ = bytes;
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUresult result = cuda().cuMemAlloc(&kept_, bytes);
    if (result == CUDA_SUCCESS) result = cuda().cuIpcGetMemHandle(&answer.memory, kept_);
    if (result == CUDA_SUCCESS)
      result = cuda().cuEventCreate(&event_, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING);
    if (result == CUDA_SUCCESS) result = cuda().cuIpcGetEventHandle(&answer.event, event_);
    if (result == CUDA_SUCCESS) result = cuda().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING);
    if (result == CUDA_SUCCESS)
      result = cuda().cuMemCreate(&physical_, std::uint64_t{2} << 20, &properties, 0);
    if (result == CUDA_SUCCESS)
      result = cuda().cuMemExportToShareableHandle(&fd, physical_,
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    return result;
  }

  /// The sink's half. Whether the host got the weights.
  bool refit(const Question& question, int fd, int& result) {
    const auto mistake = static_cast<Mistake>(question.text[0]);
    const std::uint64_t seed = question.number;
    CUevent from_source = nullptr;
    result = fd >= 0 ? import(fd, question.bytes)
                     : cuda().cuIpcOpenMemHandle(&kept_, question.memory,
                                                 CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (result == CUDA_SUCCESS) result = cuda().cuIpcOpenEventHandle(&from_source, question.event);
    if (result != CUDA_SUCCESS) return false;
    CUdeviceptr live = 0;
    void* memory = nullptr;
    CUstream copying = nullptr;
    CUstream reading = nullptr;
    CUevent copied = nullptr;
    cuda().cuMemAlloc(&live, kWeightBytes);
    cuda().cuMemHostAlloc(&memory, kWeightBytes, 0);
    cuda().cuStreamCreate(&copying, CU_STREAM_NON_BLOCKING);
    cuda().cuStreamCreate(&reading, CU_STREAM_NON_BLOCKING);
    cuda().cuEventCreate(&copied, CU_EVENT_DISABLE_TIMING);
    auto* host = static_cast<unsigned char*>(memory);
    std::memset(host, 0, kWeightBytes);

    if (mistake != Mistake::no_wait_for_source) cuda().cuStreamWaitEvent(copying, from_source, 0);
    result = batch_copy(live, kept_, seed, copying);
    cuda().cuEventRecord(copied, copying);
    if (mistake != Mistake::no_event_between_streams) cuda().cuStreamWaitEvent(reading, copied, 0);
    cuda().cuMemcpyDtoHAsync(host, live, kWeightBytes, reading);
    if (mistake != Mistake::no_sync) cuda().cuStreamSynchronize(reading);
    bool right = true;
    for (std::size_t i = 0; i < kWeightBytes; ++i) right = right && host[i] == weight(seed, i);

    cuda().cuCtxSynchronize();
    cuda().cuEventDestroy(copied);
    cuda().cuEventDestroy(from_source);
    cuda().cuStreamDestroy(reading);
    cuda().cuStreamDestroy(copying);
    cuda().cuMemFreeHost(memory);
    cuda().cuMemFree(live);
    close_kept();
    return right;
  }

  bool started_ = false;
  int device_ = 0;
  CUdeviceptr kept_ = 0;
  std::uint64_t mapped_ = 0;
  std::uint64_t bytes_ = 0;
  CUevent event_ = nullptr;
  CUstream stream_ = nullptr;
  CUmemGenericAllocationHandle physical_ = 0;
};

int serve(unsigned int uid) {
  if (uid != 0 && (::setgid(uid) != 0 || ::setuid(uid) != 0)) return 1;
  Served served;
  Question question;
  int fd = -1;
  while (receive_packet(3, question, fd)) {
    int fd_back = -1;
    const Answer answer = served.act(question, fd, fd_back);
    if (fd >= 0) ::close(fd);
    send_packet(3, answer, fd_back);
    if (fd_back >= 0) ::close(fd_back);
  }
  return 0;
}

int act_alone(const std::string& what) {
  CUcontext context = nullptr;
  if (cuda().cuInit(0) != CUDA_SUCCESS ||
      cuda().cuDevicePrimaryCtxRetain(&context, 0) != CUDA_SUCCESS)
    return 1;
  cuda().cuCtxPushCurrent(context);
  CUdeviceptr pointer = 0;
  CUstream stream = nullptr;
  cuda().cuMemAlloc(&pointer, 4096);
  cuda().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
  if (what == "misuse") cuda().cuMemsetD8Async(pointer, 0, 4096, nullptr);
  if (what == "lose-work") cuda().cuMemsetD8Async(pointer, 0, 4096, stream);
  if (what == "read-device-memory") return *reinterpret_cast<volatile unsigned char*>(pointer);
  if (what == "fork") {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(cuda().cuStreamSynchronize(stream));
    int status = 0;
    ::waitpid(child, &status, 0);
    if (WEXITSTATUS(status) != CUDA_ERROR_NOT_INITIALIZED) return 1;
  }
  if (what == "lost") {
    cuda().control.set_faults("cuMemsetD8Async#1=719:later");
    cuda().cuMemsetD8Async(pointer, 0, 4096, stream);
    if (cuda().cuStreamSynchronize(stream) != CUDA_ERROR_LAUNCH_FAILED) return 1;
  }
  if (what == "kernel") {
    const std::vector<char> image = make_fatbin({90});
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    cuda().cuModuleLoadData(&module, image.data());
    if (cuda().cuModuleGetFunction(&function, module, "fake_add") != CUDA_SUCCESS) return 1;
    cuda().cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, nullptr);
    cuda().cuStreamSynchronize(stream);
    cuda().cuModuleUnload(module);
  }
  cuda().cuStreamDestroy(stream);
  if (what != "lose-work") cuda().cuMemFree(pointer);
  if (what != "leak" && what != "lose-work") cuda().cuDevicePrimaryCtxRelease(0);
  return 0;
}

}  // namespace
}  // namespace fakecuda::test

int main(int count, char** arguments) {
  using namespace fakecuda::test;  // NOLINT: a small program about this one namespace
  const std::string what = count > 1 ? arguments[1] : "";
  return what == "serve" ? serve(static_cast<unsigned int>(std::stoul(arguments[2])))
                         : act_alone(what);
}
