# Compiles the sources of a target as one file for each of their folders, in the sanitizers' builds: parsing headers is
# most of what those do. scripts/analyse sees to it that the files of a folder go together. The other builds compile file
# by file, so that a missing include shows.
function(refit_compile_by_folder)
  if(NOT REFIT_SANITIZER)
    return()
  endif()
  foreach(target IN LISTS ARGN)
    get_target_property(sources ${target} SOURCES)
    foreach(source IN LISTS sources)
      get_filename_component(folder "${source}" DIRECTORY)
      string(MAKE_C_IDENTIFIER "in_${folder}" group)
      set_source_files_properties(${source} PROPERTIES UNITY_GROUP ${group})
    endforeach()
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  endforeach()
endfunction()
