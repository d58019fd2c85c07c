# Compiles the sources of targets as one file for each of their folders, because parsing headers is most of what a build
# does: what ships in the sanitizers' builds, and with ALWAYS in every one. The files of a folder must go together;
# scripts/analyse sees to it for what ships. Elsewhere that is compiled file by file, so that a missing include shows.
function(refit_compile_by_folder)
  cmake_parse_arguments(by_folder "ALWAYS" "" "" ${ARGN})
  if(NOT REFIT_SANITIZER AND NOT by_folder_ALWAYS)
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
  endforeach()
endfunction()
