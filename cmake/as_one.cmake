# Compiles the sources of targets as one file for each target, because parsing headers is most of what a build does: they
# must go together. A Debug build compiles what ships file by file, so that a missing include shows where code is written;
# ALWAYS: that one as one, too.
function(refit_compile_as_one)
  cmake_parse_arguments(as_one "ALWAYS" "" "" ${ARGN})
  if(CMAKE_BUILD_TYPE STREQUAL "Debug" AND NOT as_one_ALWAYS)
    return()
  endif()
  foreach(target IN LISTS as_one_UNPARSED_ARGUMENTS)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
    # It warns of anonymous namespaces in every file but the one that is compiled, taking the others for headers.
    target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)
  endforeach()
endfunction()
