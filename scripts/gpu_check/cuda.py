"""The CUDA driver by ctypes: what the facts of a host need, before anything is built.

A process that has called the driver must not fork without exec; see facts.py for how two processes are had all the same.
"""
import contextlib
import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

FD_HANDLE = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
LAZY_PEER_ACCESS = 1
IPC_EVENT = 4 | 2  # interprocess, without timing
ATTRIBUTES = {"major": 75, "minor": 76, "compute_mode": 20, "integrated": 18, "ipc_events": 125, "vmm": 102,
              "fd_handles": 103, "pageable_access": 88, "read_only_register": 113, "host_pointers": 91}

# name: (version of the ABI, argument types)
FUNCTIONS = {
    "cuInit": (2000, [c_uint]),
    "cuDeviceGetCount": (2000, [POINTER(c_int)]),
    "cuDeviceGetName": (2000, [c_char_p, c_int, c_int]),
    "cuDeviceGetUuid": (11040, [c_void_p, c_int]),
    "cuDeviceGetAttribute": (2000, [POINTER(c_int), c_int, c_int]),
    "cuDeviceTotalMem": (3020, [POINTER(c_size_t), c_int]),
    "cuDeviceCanAccessPeer": (4000, [POINTER(c_int), c_int, c_int]),
    "cuDevicePrimaryCtxRetain": (7000, [POINTER(c_void_p), c_int]),
    "cuDevicePrimaryCtxRelease": (11000, [c_int]),
    "cuCtxPushCurrent": (4000, [c_void_p]),
    "cuCtxPopCurrent": (4000, [POINTER(c_void_p)]),
    "cuMemAlloc": (3020, [POINTER(c_ulonglong), c_size_t]),
    "cuMemFree": (3020, [c_ulonglong]),
    "cuMemGetAddressRange": (3020, [POINTER(c_ulonglong), POINTER(c_size_t), c_ulonglong]),
    "cuMemcpyHtoD": (3020, [c_ulonglong, c_void_p, c_size_t]),
    "cuMemcpyDtoH": (3020, [c_void_p, c_ulonglong, c_size_t]),
    "cuMemsetD8Async": (3020, [c_ulonglong, ctypes.c_ubyte, c_size_t, c_void_p]),
    "cuStreamCreate": (2000, [POINTER(c_void_p), c_uint]),
    "cuStreamDestroy": (4000, [c_void_p]),
    "cuStreamSynchronize": (2000, [c_void_p]),
    "cuStreamWaitEvent": (3020, [c_void_p, c_void_p, c_uint]),
    "cuEventCreate": (2000, [POINTER(c_void_p), c_uint]),
    "cuEventRecord": (2000, [c_void_p, c_void_p]),
    "cuEventSynchronize": (2000, [c_void_p]),
    "cuEventDestroy": (4000, [c_void_p]),
    "cuIpcGetMemHandle": (4010, [c_void_p, c_ulonglong]),
    "cuIpcCloseMemHandle": (4010, [c_ulonglong]),
    "cuIpcGetEventHandle": (4010, [c_void_p, c_void_p]),
    "cuMemGetAllocationGranularity": (10020, [POINTER(c_size_t), c_void_p, c_int]),
    "cuMemCreate": (10020, [POINTER(c_ulonglong), c_size_t, c_void_p, c_ulonglong]),
    "cuMemRelease": (10020, [c_ulonglong]),
    "cuMemAddressReserve": (10020, [POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong]),
    "cuMemAddressFree": (10020, [c_ulonglong, c_size_t]),
    "cuMemMap": (10020, [c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong]),
    "cuMemUnmap": (10020, [c_ulonglong, c_size_t]),
    "cuMemSetAccess": (10020, [c_ulonglong, c_size_t, c_void_p, c_size_t]),
    "cuMemExportToShareableHandle": (10020, [c_void_p, c_ulonglong, c_int, c_ulonglong]),
    "cuMemImportFromShareableHandle": (10020, [POINTER(c_ulonglong), c_void_p, c_int]),
    "cuLaunchHostFunc": (10000, [c_void_p, c_void_p, c_void_p]),
}


class Handle(ctypes.Structure):
    """Of legacy memory and of an event. Two calls take it by value."""
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


FUNCTIONS["cuIpcOpenMemHandle"] = (11000, [POINTER(c_ulonglong), Handle, c_uint])
FUNCTIONS["cuIpcOpenEventHandle"] = (4010, [POINTER(c_void_p), Handle])


class Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationProperties(ctypes.Structure):
    _fields_ = [("type", c_int), ("handle_types", c_int), ("location", Location), ("unused", c_void_p),
                ("flags", ctypes.c_ubyte * 8)]


class AccessDescription(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", c_int)]


class CudaError(Exception):
    def __init__(self, call, code, text):
        super().__init__(f"{call}: {text} ({code})")
        self.call, self.code = call, code


class NoDriver(Exception):
    """Why there is none."""


class Driver:
    """Calls by name, each an exception where it fails: driver.cuMemFree(pointer)."""

    def __init__(self):
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoDriver(f"no libcuda.so.1: {error}") from error
        version = c_int()
        self.library.cuDriverGetVersion(byref(version))
        self.version = version.value
        self.is_fake = hasattr(self.library, "fakecuda_calls")
        self.found = {}
        self.cuInit(0)

    def text_of(self, code):
        text = c_char_p()
        self.library.cuGetErrorName(code, byref(text))
        return text.value.decode() if text.value else "CUDA error"

    def function(self, name):
        """None where this driver is without it."""
        if name not in self.found:
            abi, arguments = FUNCTIONS[name]
            pointer = c_void_p()
            status = c_int()
            code = self.library.cuGetProcAddress_v2(name.encode(), byref(pointer), c_int(abi), c_ulonglong(0),
                                                    byref(status))
            made = ctypes.CFUNCTYPE(c_int, *arguments)(pointer.value) if code == 0 and pointer.value else None
            self.found[name] = made
        return self.found[name]

    def __getattr__(self, name):
        if name not in FUNCTIONS:
            raise AttributeError(name)
        function = self.function(name)
        if function is None:
            raise CudaError(name, 500, "the driver has no such function")

        def call(*arguments):
            code = function(*arguments)
            if code != 0:
                raise CudaError(name, code, self.text_of(code))
        return call

    # ---- what every probe needs

    @contextlib.contextmanager
    def context(self, device=0):
        held = c_void_p()
        self.cuDevicePrimaryCtxRetain(byref(held), device)
        self.cuCtxPushCurrent(held)
        try:
            yield
        finally:
            self.cuCtxPopCurrent(byref(held))
            self.cuDevicePrimaryCtxRelease(device)

    @contextlib.contextmanager
    def stream(self):
        made = c_void_p()
        self.cuStreamCreate(byref(made), 1)
        try:
            yield made
        finally:
            self.cuStreamDestroy(made)

    def count(self):
        value = c_int()
        self.cuDeviceGetCount(byref(value))
        return value.value

    def granularity(self, properties, recommended=0):
        value = c_size_t()
        self.cuMemGetAllocationGranularity(byref(value), byref(properties), recommended)
        return value.value

    def read(self, pointer, size):
        into = (ctypes.c_ubyte * size)()
        self.cuMemcpyDtoH(into, pointer, size)
        return bytes(into)

    def write(self, pointer, data):
        self.cuMemcpyHtoD(pointer, data, len(data))


def device_memory(device=0):
    properties = AllocationProperties()
    properties.type = 1  # pinned
    properties.handle_types = FD_HANDLE
    properties.location = Location(1, device)
    return properties


class Legacy:
    """An allocation of cuMemAlloc, and what another process opens."""

    def __init__(self, driver, size):
        self.driver, self.size, self.address = driver, size, c_ulonglong()
        driver.cuMemAlloc(byref(self.address), size)

    def handle(self):
        made = Handle()
        self.driver.cuIpcGetMemHandle(byref(made), self.address)
        return bytes(made.bytes)

    def free(self):
        self.driver.cuMemFree(self.address)


class OpenedLegacy:
    def __init__(self, driver, handle):
        self.driver, self.address = driver, c_ulonglong()
        driver.cuIpcOpenMemHandle(byref(self.address), Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS)

    def close(self):
        self.driver.cuIpcCloseMemHandle(self.address)


class Segment:
    """Physical memory of a device, mapped here: made by this process, or from another's fd."""

    def __init__(self, driver, size, fd=None):
        self.driver, self.size, self.address = driver, size, c_ulonglong()
        handle = c_ulonglong()
        if fd is None:
            driver.cuMemCreate(byref(handle), size, byref(device_memory()), 0)
        else:
            driver.cuMemImportFromShareableHandle(byref(handle), c_void_p(fd), FD_HANDLE)
        try:
            driver.cuMemAddressReserve(byref(self.address), size, 0, 0, 0)
            driver.cuMemMap(self.address, size, 0, handle, 0)
            if fd is None:
                exported = c_int(-1)
                driver.cuMemExportToShareableHandle(byref(exported), handle, FD_HANDLE, 0)
                self.fd = exported.value
        finally:
            driver.cuMemRelease(handle)
        access = AccessDescription(Location(1, 0), 3)
        driver.cuMemSetAccess(self.address, size, byref(access), 1)

    def free(self):
        self.driver.cuMemUnmap(self.address, self.size)
        self.driver.cuMemAddressFree(self.address, self.size)

    close = free
