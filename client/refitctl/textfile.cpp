// A file that is replaced whole. Any thread. Knows nothing of what the text says.
#include "refitctl/textfile.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "posix/unique_fd.hpp"
#include "refitctl/output.hpp"

namespace refit::ctl {
namespace {

Result<void> fill(int fd, std::string_view text, const std::string& path) {
  REFIT_TRY(write_all(fd, text));
  if (::fchmod(fd, 0644) != 0) return fail_os("setting the mode of " + path, errno);
  if (::fsync(fd) != 0) return fail_os("syncing " + path, errno);
  return {};
}

}  // namespace

Result<void> replace_file(const std::string& path, std::string_view text) {
  const std::size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (name.empty()) return fail(Errc::bad_argument, "\"" + path + "\" names no file");
  // Its name does not end in .prom, so that the collector passes over it.
  std::string beside = folder + (folder == "." ? "/" : "") + "." + name + ".XXXXXX";
  const UniqueFd file = UniqueFd::adopt(::mkostemp(beside.data(), O_CLOEXEC));
  if (!file) return fail_os("making a file in " + folder, errno);
  Result<void> filled = fill(file.get(), text, beside);
  if (filled && ::rename(beside.c_str(), path.c_str()) != 0)
    filled = fail_os("renaming " + beside + " to " + path, errno);
  if (!filled) {
    ::unlink(beside.c_str());
    return filled;
  }
  const UniqueFd directory =
      UniqueFd::adopt(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory || ::fsync(directory.get()) != 0) return fail_os("syncing " + folder, errno);
  return {};
}

}  // namespace refit::ctl
