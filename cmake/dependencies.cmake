# Finds what the project stands on, and says what is missing and how to get it.

set(REFIT_CARRIED "" CACHE PATH
  "folder of libraries that came with the source (scripts/gpu-check pack): none of this host's packages is used")

find_package(Threads REQUIRED)
if(REFIT_CARRIED)
  include(cmake/carried_packages.cmake)
else()
  include(cmake/host_packages.cmake)
endif()

set(REFIT_HAVE_TORCH OFF)
set(REFIT_TORCH_WHEEL "" CACHE PATH
  "folder `torch` of an installed PyTorch wheel, whose libtorch is to be taken as it lies there")
if(REFIT_TORCH)
  if(REFIT_TORCH_WHEEL)
    include(cmake/torch_wheel.cmake)
  else()
    find_package(Torch QUIET)
  endif()
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
