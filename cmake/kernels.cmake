# Kernels for casts and fine strides, by nvcc. A command of our own and no CUDA language: CMake 3.25 ignores
# CUDA_FATBIN_COMPILATION, which is newer, without a word. Sets REFIT_KERNEL_IMAGE to the fatbin, or to nothing.

set(REFIT_KERNEL_IMAGE "")
if(REFIT_CARRIED AND EXISTS ${REFIT_CARRIED}/cuda/kernels.fatbin)
  set(REFIT_KERNEL_IMAGE ${REFIT_CARRIED}/cuda/kernels.fatbin)
  return()
endif()

find_program(REFIT_NVCC nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
  DOC "the CUDA toolkit's compiler, 12.8 or newer")
set(why "nvcc was not found; install a CUDA toolkit (12.8 or newer), or set CUDA_PATH to one")
if(REFIT_NVCC AND REFIT_KERNELS)
  execute_process(COMMAND ${REFIT_NVCC} --version OUTPUT_VARIABLE words ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" words "${words}")
  if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.8)
    set(REFIT_KERNEL_IMAGE ${PROJECT_BINARY_DIR}/core/kernels.fatbin)
  else()
    set(why "${REFIT_NVCC} is of CUDA '${CMAKE_MATCH_1}' and 12.8 is needed")
  endif()
elseif(REFIT_NVCC)
  set(why "REFIT_KERNELS is off")
endif()
if(NOT REFIT_KERNEL_IMAGE)
  message(STATUS "Kernels are left out of this build, so that tensors in device memory are not cast: ${why}.")
  return()
endif()

# PTX for what comes after. -Werror: a warning here is of code that no other compiler reads.
add_custom_command(
  OUTPUT ${REFIT_KERNEL_IMAGE}
  COMMAND ${REFIT_NVCC} -std=c++20 -O3 -fatbin -ccbin ${CMAKE_CXX_COMPILER} -Werror all-warnings
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
    -gencode arch=compute_100,code=[sm_100,compute_100]
    -I${PROJECT_SOURCE_DIR}/core -I${PROJECT_SOURCE_DIR}/core/include
    -MD -MF ${REFIT_KERNEL_IMAGE}.d -o ${REFIT_KERNEL_IMAGE}
    ${PROJECT_SOURCE_DIR}/core/memory/cuda/kernels/strided_copy.cu
  DEPENDS ${PROJECT_SOURCE_DIR}/core/memory/cuda/kernels/strided_copy.cu
  DEPFILE ${REFIT_KERNEL_IMAGE}.d
  COMMENT "Compiling kernels for devices"
  VERBATIM)
add_custom_target(refit_kernels DEPENDS ${REFIT_KERNEL_IMAGE})
