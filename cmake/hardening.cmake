# What an optimised build adds against memory errors; tests/install/hardening_test.sh reads it back from the binaries.
# Not in sanitizer builds, which find more and whose runtimes interpose the same functions.

include(CheckPIESupported)
check_pie_supported(LANGUAGES CXX)

if(NOT REFIT_SANITIZER)
  set(optimised $<CONFIG:Release,RelWithDebInfo>)
  add_compile_options("$<${optimised}:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=3>"
    "$<${optimised}:-fstack-protector-strong;-fstack-clash-protection>")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    add_compile_options("$<${optimised}:-fcf-protection>")
  endif()
  add_link_options("$<${optimised}:LINKER:-z,relro,-z,now,-z,noexecstack,--as-needed>")
endif()
