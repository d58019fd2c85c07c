# What cmake/host_packages.cmake gives, of the folder that scripts/gpu-check packs: for a host that has a compiler, CMake
# and nothing else. Libraries are archives, so that they ask nothing of the host's libc but what they call.

set(carried_include ${REFIT_CARRIED}/include)
set(carried_lib ${REFIT_CARRIED}/lib)

function(refit_carried_headers target)
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${target} SYSTEM INTERFACE ${carried_include})
endfunction()
function(refit_carried_archive target file)
  add_library(${target} STATIC IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION ${carried_lib}/${file})
  target_include_directories(${target} SYSTEM INTERFACE ${carried_include})
  target_link_libraries(${target} INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
endfunction()

refit_carried_headers(Boost::headers)
refit_carried_headers(nlohmann_json::nlohmann_json)
refit_carried_headers(CLI11::CLI11)
refit_carried_headers(tl::expected)
refit_carried_headers(PkgConfig::XXHASH)
target_compile_definitions(PkgConfig::XXHASH INTERFACE XXH_INLINE_ALL)
refit_carried_archive(OpenSSL::Crypto libcrypto.a)
refit_carried_archive(PkgConfig::RE2 libre2.a)
set(REFIT_FLATBUFFERS_INCLUDE ${carried_include})
set(REFIT_TOML_INCLUDE ${carried_include})
if(REFIT_TESTS)
  refit_carried_archive(GTest::gtest libgtest.a)
  refit_carried_archive(GTest::gtest_main libgtest_main.a)
  target_link_libraries(GTest::gtest_main INTERFACE GTest::gtest)
endif()

# There is no archive of libsystemd. The host's is taken if it has one, even without its -dev package; else the carried
# one with what it needs, which wants glibc 2.34.
refit_carried_headers(PkgConfig::SYSTEMD)
find_library(REFIT_HOST_LIBSYSTEMD libsystemd.so.0)
if(REFIT_HOST_LIBSYSTEMD)
  target_link_libraries(PkgConfig::SYSTEMD INTERFACE ${REFIT_HOST_LIBSYSTEMD})
else()
  message(STATUS "libsystemd: the carried one")
  target_link_libraries(PkgConfig::SYSTEMD INTERFACE ${carried_lib}/systemd/libsystemd.so.0)
  # DT_RPATH, which also finds what that library needs.
  target_link_options(PkgConfig::SYSTEMD INTERFACE
    "LINKER:-rpath,${carried_lib}/systemd,--disable-new-dtags,-rpath-link,${carried_lib}/systemd")
endif()
