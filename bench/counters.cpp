// Counting from outside. See counters.hpp.
//
// Entered by the orchestrating thread. Must not rely on anything that the measured process says
// about itself.
#include "counters.hpp"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

#include "driver_calls.hpp"
#include "floor.hpp"

namespace refit::bench {
namespace {

namespace fs = std::filesystem;

std::string proc(pid_t pid, const char* name) {
  return "/proc/" + std::to_string(pid) + "/" + name;
}

/// The number behind `key:` in a file of "key: number kB" lines, in KiB; 0 if it is not there.
std::uint64_t kib_of(const std::string& path, const std::string& key) {
  std::ifstream stream(path);
  std::string line;
  while (std::getline(stream, line)) {
    if (line.rfind(key + ":", 0) == 0) return std::stoull(line.substr(key.size() + 1));
  }
  return 0;
}

std::vector<pid_t> threads_of(pid_t pid) {
  std::vector<pid_t> threads;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(proc(pid, "task"), error)) {
    threads.push_back(static_cast<pid_t>(std::stol(entry.path().filename().string())));
  }
  return threads;
}

bool is_traced(pid_t pid) {
  const std::vector<pid_t> threads = threads_of(pid);
  for (const pid_t thread : threads) {
    const std::string status = proc(pid, "task/") + std::to_string(thread) + "/status";
    if (kib_of(status, "TracerPid") == 0) return false;
  }
  return !threads.empty();
}

}  // namespace

std::uint64_t memory_available_bytes() { return kib_of("/proc/meminfo", "MemAvailable") * 1024; }

Result<std::uint64_t> page_faults(pid_t pid) {
  std::ifstream stream(proc(pid, "stat"));
  std::string text;
  std::getline(stream, text);
  const auto comm_end = text.rfind(')');
  if (comm_end == std::string::npos) return fail_os("read " + proc(pid, "stat"), ESRCH);
  std::istringstream rest(text.substr(comm_end + 1));
  std::string state;
  std::int64_t ppid, group, session, tty, terminal, flags, minor, minor_children, major;
  rest >> state >> ppid >> group >> session >> tty >> terminal >> flags >> minor >>
      minor_children >> major;
  if (!rest) return fail_os("parse " + proc(pid, "stat"), EINVAL);
  return static_cast<std::uint64_t>(minor + major);
}

Result<MemoryUse> memory_use(pid_t pid, const std::string& tensor_label) {
  std::ifstream stream(proc(pid, "smaps"));
  if (!stream) return fail_os("open " + proc(pid, "smaps"), errno);
  MemoryUse use;
  std::uint64_t private_kib = 0, session_kib = 0, tensor_kib = 0, huge_kib = 0;
  enum class Kind { other, session, tensor, foreign } kind = Kind::other;
  std::set<std::string> seen;  // a memfd that is mapped twice is one
  std::string line;
  while (std::getline(stream, line)) {
    const auto colon = line.find(':');
    const bool is_header =
        line.find('-') < line.find(' ') && (colon == std::string::npos || line.find(' ') < colon);
    if (is_header) {
      std::istringstream fields(line);
      std::string range, mode, offset, device, inode, path;
      fields >> range >> mode >> offset >> device >> inode;
      std::getline(fields, path);
      if (path.find("memfd:") == std::string::npos) {
        kind = Kind::other;
      } else if (path.find("memfd:refit-request") != std::string::npos ||
                 path.find("memfd:refit-response") != std::string::npos) {
        kind = seen.insert(inode).second ? Kind::session : Kind::foreign;
      } else {
        kind = path.find(tensor_label) != std::string::npos ? Kind::tensor : Kind::foreign;
      }
      continue;
    }
    if (colon == std::string::npos || line.find(" kB") == std::string::npos) continue;
    const std::string key = line.substr(0, colon);
    const std::uint64_t value = std::stoull(line.substr(colon + 1));
    if (kind == Kind::other &&
        (key == "Private_Clean" || key == "Private_Dirty" || key == "Private_Hugetlb")) {
      private_kib += value;
    } else if (kind == Kind::session && key == "Size") {
      session_kib += value;
    } else if (kind == Kind::tensor && key == "Rss") {
      tensor_kib += value;
    } else if (kind == Kind::tensor && (key == "ShmemPmdMapped" || key == "FilePmdMapped")) {
      huge_kib += value;
    }
  }
  use.private_mib = static_cast<double>(private_kib) / 1024;
  use.session_mib = static_cast<double>(session_kib) / 1024;
  use.page_tables_mib = static_cast<double>(kib_of(proc(pid, "status"), "VmPTE")) / 1024;
  use.tensor_bytes = tensor_kib * 1024;
  use.tensor_huge_fraction =
      tensor_kib == 0 ? 0 : static_cast<double>(huge_kib) / static_cast<double>(tensor_kib);
  use.tensor_page_bytes = use.tensor_huge_fraction > 0.5
                              ? std::uint64_t{2} << 20
                              : static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return use;
}

Result<void> pin_all_threads(pid_t pid, int core) {
  const cpu_set_t set = only_core(core);
  for (const pid_t thread : threads_of(pid)) {
    if (::sched_setaffinity(thread, sizeof set, &set) != 0)
      return fail_os("sched_setaffinity", errno);
  }
  return {};
}

Result<CounterFile> CounterFile::make(const TemporaryDirectory& directory, std::size_t bytes) {
  static int count = 0;
  const std::string path = directory.path() + "/counter-" + std::to_string(++count);
  const UniqueFd fd =
      UniqueFd::adopt(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    return fail_os("create " + path, errno);
  void* page = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (page == MAP_FAILED) return fail_os("mmap " + path, errno);
  return CounterFile(path, page, bytes);
}

CounterFile::~CounterFile() {
  if (page_ != nullptr) ::munmap(page_, bytes_);
}

std::uint64_t allocations_in(const CounterFile& file) {
  return static_cast<const std::atomic<std::uint64_t>*>(file.data())->load();
}

CallCounts driver_calls_in(const CounterFile& file) {
  CallCounts counts;
  for (const DriverCalls::Entry& entry : static_cast<const DriverCalls*>(file.data())->entries) {
    if (entry.name[0] == '\0') break;
    counts[entry.name] += entry.count.load();
  }
  return counts;
}

Result<std::string> find_strace() {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "/usr/bin:/bin" : path);
  std::string folder;
  while (std::getline(folders, folder, ':')) {
    const std::string candidate = folder + "/strace";
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return fail(Errc::unsupported, "strace is not installed (Debian: apt-get install strace)");
}

Result<CallCounts> count_syscalls(const std::string& strace, pid_t pid,
                                  const TemporaryDirectory& directory,
                                  const std::function<Result<void>()>& action) {
  static int count = 0;
  const std::string base = directory.path() + "/strace-" + std::to_string(++count);
  SpawnOptions options;
  options.arguments = {strace, "-f", "-c", "-o", base + ".txt", "-p", std::to_string(pid)};
  options.output_path = base + ".log";
  REFIT_TRY_ASSIGN(Child child, Child::spawn(options));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!is_traced(pid)) {
    if (!child.alive() || std::chrono::steady_clock::now() > end) {
      std::ifstream log(options.output_path);
      std::string line;
      std::getline(log, line);
      return fail(Errc::unsupported, "strace could not attach to the daemon: " + line);
    }
    ::usleep(5000);
  }
  REFIT_TRY(action());
  child.signal(SIGINT);
  if (!child.wait(std::chrono::seconds(10)))
    return fail(Errc::deadline, "strace did not end after SIGINT");

  CallCounts counts;
  std::ifstream summary(base + ".txt");
  std::string line;
  while (std::getline(summary, line)) {
    std::istringstream fields(line);
    std::vector<std::string> words;
    for (std::string word; fields >> word;) words.push_back(word);
    // "% time  seconds  usecs/call  calls  [errors]  syscall"
    if (words.size() < 5 || words[0].find_first_not_of("0123456789.") != std::string::npos ||
        words.back() == "total") {
      continue;
    }
    if (words[3].find_first_not_of("0123456789") != std::string::npos) continue;
    counts[words.back()] += std::stoull(words[3]);
  }
  if (counts.empty()) return fail(Errc::unsupported, "strace wrote no summary");
  return counts;
}

}  // namespace refit::bench
