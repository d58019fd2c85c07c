# The packages of this host, and what to install where one is missing.

find_package(PkgConfig REQUIRED)
find_package(Boost 1.74 REQUIRED)
find_package(OpenSSL 3 REQUIRED COMPONENTS Crypto)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(CLI11 REQUIRED)
find_package(tl-expected REQUIRED)  # package libexpected-dev
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
# XXH3 by the widest registers of the CPU that it runs on, where the library was built with that.
include(CheckCXXSymbolExists)
set(CMAKE_REQUIRED_LIBRARIES PkgConfig::XXHASH)
check_cxx_symbol_exists(XXH3_128bits_update_dispatch "xxh_x86dispatch.h" REFIT_XXHASH_DISPATCHES)
unset(CMAKE_REQUIRED_LIBRARIES)
pkg_check_modules(SYSTEMD REQUIRED IMPORTED_TARGET libsystemd)
pkg_check_modules(RE2 REQUIRED IMPORTED_TARGET re2)

find_program(REFIT_FLATC flatc REQUIRED DOC "FlatBuffers compiler (package flatbuffers-compiler)")
find_path(REFIT_FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h REQUIRED DOC "package libflatbuffers-dev")
find_path(REFIT_TOML_INCLUDE toml++/toml.h REQUIRED DOC "package libtomlplusplus-dev; headers only")

if(REFIT_TESTS)
  find_package(GTest REQUIRED)
endif()
