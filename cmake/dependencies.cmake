# Finds what the project stands on, and says what is missing and how to get it.

find_package(Threads REQUIRED)
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
  include(GoogleTest)
endif()

set(REFIT_HAVE_TORCH OFF)
if(REFIT_TORCH)
  find_package(Torch QUIET)
  if(Torch_FOUND)
    set(REFIT_HAVE_TORCH ON)
  else()
    message(STATUS "libtorch not found: the example, the demo and the torch adapter's test are left out. "
                   "Debian: apt-get install libtorch-dev; elsewhere set CMAKE_PREFIX_PATH to a libtorch.")
  endif()
endif()

# The driver is found at run time (core/memory/cuda/driver.hpp), so that headers are all it takes.
set(REFIT_HAVE_CUDA OFF)
if(REFIT_CUDA)
  find_path(REFIT_CUDA_INCLUDE cudaTypedefs.h HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES include
    DOC "headers of the CUDA toolkit, 13.0 or newer")
  if(REFIT_CUDA_INCLUDE)
    set(REFIT_HAVE_CUDA ON)
    add_library(refit_cuda_headers INTERFACE)
    target_include_directories(refit_cuda_headers SYSTEM INTERFACE ${REFIT_CUDA_INCLUDE})
  else()
    message(STATUS "CUDA's headers not found: device memory is left out of this build; host memory only. "
                   "Install a CUDA toolkit (13.0 or newer), or set CUDA_PATH to one.")
  endif()
endif()

# g++ 12 warns of overlapping copies inside its own std::string (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  add_compile_options(-Wno-restrict)
endif()
