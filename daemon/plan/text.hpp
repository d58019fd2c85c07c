// How problems of manifests and plans name things: quoted names, described tensors, and which names
// are legal.
//
// Pure, any thread. Everything here may be fed bytes of a peer: what comes out is one line of
// printable UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "refit/types.hpp"

namespace refit::daemon {

[[nodiscard]] inline std::string number(std::uint64_t value) { return std::to_string(value); }

/// The text in single quotes on one line; control bytes and broken UTF-8 as \xNN, cut after 512
/// bytes.
[[nodiscard]] std::string in_quotes(std::string_view text);

/// "'name' (torch.float32, (3, 4)) of label"; with its box in the global shape where it is not the
/// whole tensor.
[[nodiscard]] std::string describe(const TensorSpec& tensor, std::string_view label);

/// What is wrong with a tensor's name: empty, longer than `bytes_max`, a control character, no
/// UTF-8 (peers print names to terminals and into JSON, which takes nothing else). nullopt for a
/// legal name.
[[nodiscard]] std::optional<std::string> name_problem(std::string_view name, std::size_t bytes_max);

}  // namespace refit::daemon
