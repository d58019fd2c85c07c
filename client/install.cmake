# Puts the client library where other projects find it: find_package(refit CONFIG) and pkg-config refit.
# Two components: `runtime` is what programs need to run, `development` what they are built with. The tree may be moved
# after installation: nothing in it names the prefix.

include(CMakePackageConfigHelpers)

install(TARGETS refit_shared EXPORT refit
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime NAMELINK_COMPONENT development
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/refit ${PROJECT_SOURCE_DIR}/core/include/refit
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development FILES_MATCHING PATTERN "*.hpp")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/refit)
configure_package_config_file(refitConfig.cmake.in refitConfig.cmake INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break.
write_basic_package_version_file(refitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/refitConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/refitConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT development)
install(EXPORT refit FILE refitTargets.cmake NAMESPACE refit:: DESTINATION ${package_dir} COMPONENT development)

# From the .pc file to the folders, so that the prefix is wherever the file was found.
set(pc_dir ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH REFIT_PC_LIBDIR ${pc_dir} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH REFIT_PC_INCLUDEDIR ${pc_dir} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(refit.pc.in refit.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/refit.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
  COMPONENT development)
