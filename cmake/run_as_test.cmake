# Has ctest run programs of GoogleTest: each as one test, or as SHARDS tests of an equal part each. A process for every
# test would take, under a sanitizer, longer than most of the tests. scripts/run-tests reads in the report of each what
# passed.
#
#   refit_run_as_test(PROGRAM [SHARDS N] [TIMEOUT SECONDS] [SERIAL] [ARGUMENTS WORD...])
function(refit_run_as_test program)
  cmake_parse_arguments(run "SERIAL" "TIMEOUT;SHARDS" "ARGUMENTS" ${ARGN})
  if(NOT run_SHARDS)
    set(run_SHARDS 1)
  endif()
  if(NOT run_TIMEOUT)
    set(run_TIMEOUT 300)
  endif()
  foreach(shard RANGE 1 ${run_SHARDS})
    set(name ${program})
    if(run_SHARDS GREATER 1)
      string(APPEND name :${shard})
    endif()
    math(EXPR index "${shard} - 1")
    string(REPLACE ":" "-" report ${name})
    add_test(NAME ${name} COMMAND ${program} ${run_ARGUMENTS})
    # Long ones first, so that none is left to run alone.
    set_tests_properties(${name} PROPERTIES TIMEOUT ${run_TIMEOUT} COST ${run_TIMEOUT} RUN_SERIAL ${run_SERIAL}
      ENVIRONMENT "GTEST_TOTAL_SHARDS=${run_SHARDS};GTEST_SHARD_INDEX=${index};GTEST_OUTPUT=xml:${PROJECT_BINARY_DIR}/reports/${report}.xml")
  endforeach()
endfunction()
