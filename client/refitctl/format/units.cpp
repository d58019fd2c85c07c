// Numbers as a person reads them. Pure; any thread; no locale. Knows nothing of what is measured.
#include "refitctl/format/units.hpp"

#include <array>
#include <cmath>
#include <cstdio>

namespace refit::ctl {
namespace {

std::string print(const char* format, double value) {
  // %f of the largest double has 309 digits.
  std::array<char, 340> buffer{};
  std::snprintf(buffer.data(), buffer.size(), format, value);
  return buffer.data();
}

std::string three_digits(double value) {
  // The bounds lie where rounding would add a digit: 9.995 is "10.0" and not "10.00".
  return print(value < 9.995 ? "%.2f" : value < 99.95 ? "%.1f" : "%.0f", value);
}

bool is_time(double us) { return std::isfinite(us) && us >= 0; }

std::string padded(std::uint64_t value) { return (value < 10 ? "0" : "") + std::to_string(value); }

}  // namespace

std::string format_bytes(std::uint64_t bytes) {
  constexpr std::array<const char*, 6> kUnits{" KiB", " MiB", " GiB", " TiB", " PiB", " EiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  // 1023.5 would be printed as 1024.
  while (value >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return three_digits(value) + kUnits[unit];
}

std::string format_duration_us(double us) {
  if (!is_time(us)) return "-";
  if (us < 999.5) return print("%.1f us", us);
  if (us < 999.5e3) return three_digits(us / 1e3) + " ms";
  return three_digits(us / 1e6) + " s";
}

std::string format_us(double us) {
  if (!is_time(us)) return "-";
  return print(us < 999.95 ? "%.1f" : "%.0f", us);
}

std::string format_uptime(std::uint64_t uptime_us) {
  const std::uint64_t seconds = uptime_us / 1'000'000;
  if (seconds < 60) return std::to_string(seconds) + " s";
  const std::uint64_t minutes = seconds / 60;
  if (minutes < 60) return std::to_string(minutes) + " min " + padded(seconds % 60) + " s";
  const std::uint64_t hours = minutes / 60;
  if (hours < 24) return std::to_string(hours) + " h " + padded(minutes % 60) + " min";
  return std::to_string(hours / 24) + " d " + std::to_string(hours % 24) + " h";
}

std::string format_rate(std::uint64_t bytes, double us) {
  if (bytes == 0 || !is_time(us) || us == 0) return "-";
  return three_digits(static_cast<double>(bytes) / us / 1e3) + " GB/s";
}

}  // namespace refit::ctl
