// Numbers as a person reads them: binary sizes, times, rates.
//
// Pure; any thread; no locale. Knows nothing of what is measured.
#pragma once

#include <cstdint>
#include <string>

namespace refit::ctl {

/// Three significant digits and a binary unit: "0 B", "640 B", "1.50 KiB", "7.22 GiB".
[[nodiscard]] std::string format_bytes(std::uint64_t bytes);

/// "12.3 us", "4.56 ms", "1.20 s", "95.0 s"; "-" for what is no time (negative, NaN, infinite).
[[nodiscard]] std::string format_duration_us(double us);

/// A bare count of microseconds for a column that names the unit: "0.0", "12.3", "45678"; "-" as
/// above.
[[nodiscard]] std::string format_us(double us);

/// "42 s", "3 min 07 s", "5 h 09 min", "12 d 4 h".
[[nodiscard]] std::string format_uptime(std::uint64_t uptime_us);

/// "10.4 GB/s", in powers of ten as memory bandwidth is given; "-" where nothing was moved or no
/// time passed.
[[nodiscard]] std::string format_rate(std::uint64_t bytes, double us);

}  // namespace refit::ctl
