# libtorch of a PyTorch wheel, as TorchConfig.cmake would give it. A wheel's own CMake files look for a whole CUDA
# toolkit, which a host that only runs PyTorch lacks; nothing here is compiled against one.

set(TORCH_INCLUDE_DIRS
  ${REFIT_TORCH_WHEEL}/include ${REFIT_TORCH_WHEEL}/include/torch/csrc/api/include)
set(TORCH_LIBRARIES "")
foreach(name torch torch_cpu c10)
  find_library(REFIT_WHEEL_${name} ${name} PATHS ${REFIT_TORCH_WHEEL}/lib NO_DEFAULT_PATH REQUIRED)
  list(APPEND TORCH_LIBRARIES ${REFIT_WHEEL_${name}})
endforeach()
# Its operators are found by being loaded; nothing refers to them by name.
foreach(name torch_cuda c10_cuda)
  find_library(REFIT_WHEEL_${name} ${name} PATHS ${REFIT_TORCH_WHEEL}/lib NO_DEFAULT_PATH)
  if(REFIT_WHEEL_${name})
    list(APPEND TORCH_LIBRARIES -Wl,--no-as-needed ${REFIT_WHEEL_${name}} -Wl,--as-needed)
  endif()
endforeach()
# CUDA's own libraries lie in wheels beside this one, and the loader finds them from there.
list(APPEND TORCH_LIBRARIES -Wl,--allow-shlib-undefined)
set(Torch_FOUND ON)
