// The scenarios that device_copier_test.cpp runs as processes.
#pragma once

#include <string_view>

namespace refit::cuda::test {

/// The exit code: 0 if all that was expected came true. What was found stands on stdout.
int run_scenario(std::string_view name);

}  // namespace refit::cuda::test
