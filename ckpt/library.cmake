# The checkpoint library as others link it: libtessera.so and libtessera.a with only the functions of tessera.h visible, that header,
# pkg-config and CMake packages, the Fortran module and the examples. docs/library.md is its manual, tests/install/ its test.
#
# Both are made from the objects of comm, storage and ckpt that the program links too. The archive holds one object, all of them linked
# together, so that what is not public can be made local: a static program may have a `status_new` of its own.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(library_objects $<TARGET_OBJECTS:tessera_ckpt> $<TARGET_OBJECTS:tessera_storage> $<TARGET_OBJECTS:tessera_comm>
                    $<TARGET_OBJECTS:tessera_base>)
# A shared libhdf5 brings what it needs; FindHDF5 lists that all the same.
set(library_hdf5 ${HDF5_C_LIBRARIES})
if(HDF5_C_LIBRARIES MATCHES "hdf5[^;]*\\.so")
  list(FILTER library_hdf5 INCLUDE REGEX "hdf5[^/]*$")
endif()
set(library_map ${CMAKE_SOURCE_DIR}/ckpt/tessera.map)

add_library(tessera_shared SHARED ${library_objects})
set_target_properties(tessera_shared PROPERTIES
  OUTPUT_NAME tessera EXPORT_NAME tessera LINKER_LANGUAGE C
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}
  INSTALL_RPATH_USE_LINK_PATH ON LINK_DEPENDS ${library_map})
target_link_options(tessera_shared PRIVATE -Wl,--version-script=${library_map} -Wl,-Bsymbolic-functions -Wl,--as-needed)
if(NOT TESSERA_SANITIZE)
  target_link_options(tessera_shared PRIVATE -Wl,-z,defs)
endif()
target_link_libraries(tessera_shared PRIVATE MPI::MPI_C ${library_hdf5} PkgConfig::PROTOBUFC PkgConfig::ISAL CURL::libcurl
                                             OpenSSL::Crypto Threads::Threads m
                                             ${CMAKE_DL_LIBS})
target_include_directories(tessera_shared INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

set(library_object ${CMAKE_BINARY_DIR}/libtessera.o)
add_custom_command(OUTPUT ${library_object}
                   COMMAND ${CMAKE_C_COMPILER} -nostdlib -r -o ${library_object} ${library_objects}
                   COMMAND ${CMAKE_OBJCOPY} --wildcard "--keep-global-symbol=tessera_[a-z]*" ${library_object}
                   DEPENDS ${library_objects} COMMAND_EXPAND_LISTS VERBATIM)
set_source_files_properties(${library_object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
add_library(tessera_static STATIC ${library_object})
set_target_properties(tessera_static PROPERTIES OUTPUT_NAME tessera EXPORT_NAME static LINKER_LANGUAGE C)
target_include_directories(tessera_static INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
set(library_private ${MPI_C_LIBRARIES} ${library_hdf5} ${PROTOBUFC_LINK_LIBRARIES} ${ISAL_LINK_LIBRARIES} ${CURL_LIBRARIES}
                    ${OPENSSL_CRYPTO_LIBRARY} -pthread -lm -ldl)
target_link_libraries(tessera_static INTERFACE ${library_private})

# --- packages. Both find the tree they lie in, so it can be moved.
file(RELATIVE_PATH library_up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" library_up "${library_up}")
string(REPLACE ";" " " library_private_flags "${library_private}")
configure_file(${CMAKE_SOURCE_DIR}/ckpt/tessera.pc.in ${GEN}/tessera.pc @ONLY)
set(library_cmake ${CMAKE_INSTALL_LIBDIR}/cmake/tessera)
configure_package_config_file(${CMAKE_SOURCE_DIR}/ckpt/tesseraConfig.cmake.in ${GEN}/tesseraConfig.cmake
                              INSTALL_DESTINATION ${library_cmake})
write_basic_package_version_file(${GEN}/tesseraConfigVersion.cmake COMPATIBILITY SameMinorVersion)

# --- install: components `library` and `program`
install(TARGETS tessera_shared tessera_static EXPORT tessera
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library)
install(FILES ckpt/tessera.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT library)
install(FILES ${GEN}/tessera.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT library)
install(FILES ${GEN}/tesseraConfig.cmake ${GEN}/tesseraConfigVersion.cmake DESTINATION ${library_cmake} COMPONENT library)
install(EXPORT tessera NAMESPACE tessera:: FILE tesseraTargets.cmake DESTINATION ${library_cmake} COMPONENT library)
install(FILES ckpt/tessera.f90 tests/install/save_load.c tests/install/save_load.cpp tests/install/save_load.f90
        DESTINATION ${CMAKE_INSTALL_DATADIR}/tessera COMPONENT library)
if(TARGET tessera)
  set_target_properties(tessera PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}" INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS tessera RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT program)
endif()
if(TARGET tessera_cuda)
  set_target_properties(tessera_cuda tessera_ops_cuda PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS tessera_cuda tessera_ops_cuda LIBRARY DESTINATION lib/tessera COMPONENT program) # where comm/device/plugin.c looks
endif()
