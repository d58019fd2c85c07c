# Compiles the sources of targets as one file for each of their folders, because parsing headers is most of what a build
# does. The files of a folder must go together; scripts/analyse sees to it for what ships. A Debug build compiles what
# ships file by file, so that a missing include shows where code is written; ALWAYS: that one by folder, too.
function(refit_compile_by_folder)
  cmake_parse_arguments(by_folder "ALWAYS" "" "" ${ARGN})
  if(CMAKE_BUILD_TYPE STREQUAL "Debug" AND NOT by_folder_ALWAYS)
    return()
  endif()
  foreach(target IN LISTS by_folder_UNPARSED_ARGUMENTS)
    get_target_property(sources ${target} SOURCES)
    foreach(source IN LISTS sources)
      get_filename_component(folder "${source}" DIRECTORY)
      string(MAKE_C_IDENTIFIER "in_${folder}" group)
      set_source_files_properties(${source} PROPERTIES UNITY_GROUP ${group})
    endforeach()
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
    # It warns of anonymous namespaces in every file but the one that is compiled, taking the others for headers.
    target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)
  endforeach()
endfunction()
