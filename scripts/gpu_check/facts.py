"""What a driver and its devices do, seen through the driver alone: one question each, answered before anything is built.

`python3 -m gpu_check.facts NAME` prints one JSON object: {"facts": {...}, "failed": "why" or null}. Questions about two
processes fork both before either calls the driver, and each may be another user.
"""
import ctypes
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from ctypes import byref, c_int, c_size_t, c_ulonglong, c_void_p

from gpu_check import cuda

MIB = 1 << 20
USERS = (0, 12345, 23456)  # root, and two that nobody is


class NotRun(Exception):
    """Why a question could not be asked here."""


# ---- two processes

class Peer:
    """One end of a pair of processes: JSON lines, and fds beside them."""

    def __init__(self, end):
        self.end = end

    def say(self, message, fds=()):
        socket.send_fds(self.end, [json.dumps(message).encode()], list(fds))

    def hear(self):
        data, fds, _, _ = socket.recv_fds(self.end, 1 << 16, 8)
        if not data:
            raise EOFError("the other process ended")
        return json.loads(data), fds


def become(uid):
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        # As in a process that this user started: setuid alone leaves /proc/PID root's.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


def child(uid, body, peer, close):
    """Runs `body(driver, peer)` as `uid` with the device's context; what it returns or why it failed is said last."""
    pid = os.fork()
    if pid != 0:
        return pid
    code = 0
    try:
        for end in close:
            end.close()
        become(uid)
        driver = cuda.Driver()
        with driver.context():
            said = body(driver, peer)
        peer.say({"done": said})
    except BaseException as error:  # pylint: disable=broad-except  # the other process waits for a word
        code = 1
        try:
            peer.say({"error": f"{type(error).__name__}: {error}"})
        except OSError:
            pass
    # What a driver checks when a process ends is a part of the answer, so the exit is an ordinary one.
    try:
        sys.exit(code)
    finally:
        if code != 0:
            os._exit(code)


def pair(exporter, importer, uids=(0, 0)):
    """Runs the two against each other. Returns what the importer said, with the exporter's last word in `exporter`."""
    if os.getuid() != 0 and any(uid != os.getuid() for uid in uids):
        raise NotRun("only root can be two users")
    # exporter <-> importer, and each of them <-> this process
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    pids = []
    for uid, body, mine, other, word in ((uids[0], exporter, a, b, words[0]), (uids[1], importer, b, a, words[1])):
        rest = [end for one in words for end in one if end is not word[1]]

        def run(driver, last, body=body, mine=mine):
            return body(driver, Peer(mine))
        pids.append(child(uid, run, Peer(word[1]), [other] + rest))
    for end in (a, b, words[0][1], words[1][1]):
        end.close()
    answers = []
    for pid, word in zip(pids, words):
        word[0].settimeout(60)
        try:
            answers.append(Peer(word[0]).hear()[0])
        except (EOFError, OSError) as error:
            answers.append({"error": f"no word: {error}"})
    for pid, answer in zip(pids, answers):
        end = time.monotonic() + 20
        status = None
        while status is None and time.monotonic() < end:
            waited, code = os.waitpid(pid, os.WNOHANG)
            status = code if waited else None
            time.sleep(0.005)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            answer.setdefault("error", "did not end")
        elif status != 0 and "error" not in answer and not answer.get("done", {}).get("dies"):
            answer["error"] = f"ended with status {status}"
    result = answers[1].get("done") or {}
    if "error" in answers[1]:
        result["error"] = answers[1]["error"]
    result["exporter"] = answers[0].get("done", answers[0].get("error"))
    return result


# ---- questions

def devices():
    driver = cuda.Driver()
    facts = {"driver_version": driver.version, "fake": driver.is_fake, "devices": []}
    for ordinal in range(driver.count()):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, 256, ordinal)
        uuid = (ctypes.c_ubyte * 16)()
        driver.cuDeviceGetUuid(uuid, ordinal)
        total = c_size_t()
        driver.cuDeviceTotalMem(byref(total), ordinal)
        device = {"name": name.value.decode(), "uuid": bytes(uuid).hex(), "memory_MiB": total.value // MIB}
        for key, attribute in cuda.ATTRIBUTES.items():
            value = c_int()
            try:
                driver.cuDeviceGetAttribute(byref(value), attribute, ordinal)
                device[key] = value.value
            except cuda.CudaError as error:
                device[key] = str(error)
        properties = cuda.device_memory(ordinal)
        device["granularity"] = driver.granularity(properties)
        device["granularity_recommended"] = driver.granularity(properties, 1)
        device["peers"] = []
        for other in range(driver.count()):
            can = c_int()
            if other != ordinal:
                driver.cuDeviceCanAccessPeer(byref(can), ordinal, other)
                if can.value:
                    device["peers"].append(other)
        facts["devices"].append(device)
    return facts


def exchange(kind, uids):
    """Memory of one user's process in another's: does it open, are the bytes right both ways, does an event open?"""
    size = 4 * MIB

    def exporter(driver, peer):
        memory = cuda.Legacy(driver, size) if kind == "legacy" else cuda.Segment(driver, size)
        event = c_void_p()
        driver.cuEventCreate(byref(event), cuda.IPC_EVENT)
        with driver.stream() as stream:
            driver.cuMemsetD8Async(memory.address, 0x5a, size, stream)
            driver.cuEventRecord(event, stream)
            driver.cuStreamSynchronize(stream)
            handle = cuda.Handle()
            driver.cuIpcGetEventHandle(byref(handle), event)
            peer.say({"handle": memory.handle().hex() if kind == "legacy" else "", "event": bytes(handle.bytes).hex()},
                     [] if kind == "legacy" else [memory.fd])
            peer.hear()
            seen = driver.read(memory.address, 64)
        driver.cuEventDestroy(event)
        if kind != "legacy":
            os.close(memory.fd)
        memory.free()
        return {"saw_the_write": seen == b"\xa5" * 64}

    def importer(driver, peer):
        message, fds = peer.hear()
        result = {}
        try:
            opened = cuda.OpenedLegacy(driver, bytes.fromhex(message["handle"])) if kind == "legacy" \
                else cuda.Segment(driver, size, fds[0])
            result["opens"] = True
            result["reads_right"] = driver.read(opened.address, 64) == b"\x5a" * 64
            driver.write(opened.address, b"\xa5" * 64)
            opened.close()
        except cuda.CudaError as error:
            result.setdefault("opens", False)
            result["refusal"] = str(error)
        for fd in fds:
            os.close(fd)
        try:
            event = c_void_p()
            driver.cuIpcOpenEventHandle(byref(event), cuda.Handle.from_buffer_copy(bytes.fromhex(message["event"])))
            with driver.stream() as stream:
                driver.cuStreamWaitEvent(stream, event, 0)
                driver.cuStreamSynchronize(stream)
            driver.cuEventDestroy(event)
            result["event_opens"] = True
        except cuda.CudaError as error:
            result["event_opens"] = False
            result["event_refusal"] = str(error)
        peer.say({})
        return result

    return pair(exporter, importer, uids)


def is_right(answer):
    seen = answer["exporter"]
    return bool(answer.get("opens") and answer.get("reads_right") and isinstance(seen, dict) and seen["saw_the_write"])


def users(kind):
    """First one user, as a control; then a client's memory in a daemon of root, and in one of another user."""
    me = os.getuid()
    facts = {"one_user": exchange(kind, (me, me))}
    if not is_right(facts["one_user"]):
        raise Failed(facts, f"not even with one user: {facts['one_user']}")
    facts["client_to_root"] = exchange(kind, (USERS[1], USERS[0]))
    facts["client_to_user"] = exchange(kind, (USERS[1], USERS[2]))
    for name, answer in facts.items():
        # That a driver refuses is an answer; that nobody answered, or wrong bytes, is not.
        if "error" in answer or (answer.get("opens") and not is_right(answer)):
            raise Failed(facts, f"{name}: {answer}")
    if kind == "vmm" and not (is_right(facts["client_to_root"]) and is_right(facts["client_to_user"])):
        raise Failed(facts, "segments by fd do not open across users, on which refit relies")
    return facts


class Failed(Exception):
    def __init__(self, facts, why):
        super().__init__(why)
        self.facts = facts


def small_allocations():
    """Two small allocations, which a driver cuts from one block: does each handle open at its own bytes?"""
    size = 4096

    def exporter(driver, peer):
        both = [cuda.Legacy(driver, size) for _ in range(2)]
        for index, memory in enumerate(both):
            driver.write(memory.address, bytes([index + 1]) * size)
        apart = both[1].address.value - both[0].address.value
        peer.say({"handles": [memory.handle().hex() for memory in both]})
        peer.hear()
        for memory in both:
            memory.free()
        return {"apart": apart}

    def importer(driver, peer):
        message, _ = peer.hear()
        handles = [bytes.fromhex(handle) for handle in message["handles"]]
        result = {"same_handle": handles[0] == handles[1], "opened": []}
        opened = []
        for handle in handles:
            try:
                opened.append(cuda.OpenedLegacy(driver, handle))
                base, size_seen = c_ulonglong(), c_size_t()
                driver.cuMemGetAddressRange(byref(base), byref(size_seen), opened[-1].address)
                result["opened"].append({"first_byte": driver.read(opened[-1].address, 1)[0],
                                         "offset_in_range": opened[-1].address.value - base.value,
                                         "range_bytes": size_seen.value})
            except cuda.CudaError as error:
                result["opened"].append({"refusal": str(error)})
        for one in opened:
            one.close()
        peer.say({})
        return result

    facts = pair(exporter, importer, (os.getuid(),) * 2)
    if [one.get("first_byte") for one in facts.get("opened", [])] != [1, 2]:
        raise Failed(facts, "a handle of a small allocation does not open at that allocation's bytes")
    return facts


def median_us(times):
    return round(statistics.median(times) * 1e6, 1)


def costs():
    """Opening a legacy handle, mapping a segment, opening an event: microseconds, the first and the median of ten more."""
    sizes = (2 * MIB, 20 * MIB, 1024 * MIB)
    repetitions = 10

    def exporter(driver, peer):
        for size in sizes:
            memory, segment = cuda.Legacy(driver, size), cuda.Segment(driver, size)
            peer.say({"handle": memory.handle().hex()}, [segment.fd])
            peer.hear()
            os.close(segment.fd)
            memory.free()
            segment.free()
        return {}

    def importer(driver, peer):
        facts = {}
        for size in sizes:
            message, (fd,) = peer.hear()
            handle = bytes.fromhex(message["handle"])
            for name, make in (("open_legacy", lambda handle=handle: cuda.OpenedLegacy(driver, handle)),
                               ("map_segment", lambda fd=fd, size=size: cuda.Segment(driver, size, fd))):
                opens, closes = [], []
                for _ in range(1 + repetitions):
                    start = time.perf_counter()
                    opened = make()
                    opens.append(time.perf_counter() - start)
                    start = time.perf_counter()
                    opened.close()
                    closes.append(time.perf_counter() - start)
                facts[f"{name}_{size // MIB}_MiB_us"] = {
                    "first": median_us(opens[:1]), "open": median_us(opens[1:]), "close": median_us(closes[1:])}
            os.close(fd)
            peer.say({})
        return facts

    return pair(exporter, importer, (os.getuid(),) * 2)


def full_queue():
    """How much a stream that stands still takes before a call waits, and how long it waits."""
    driver = cuda.Driver()
    if driver.function("cuLaunchHostFunc") is None:
        raise NotRun("this driver has no cuLaunchHostFunc, with which a stream is made to stand still")
    hold_s, slow_s, most = 4.0, 0.01, 200_000
    released = threading.Event()

    @ctypes.CFUNCTYPE(None, c_void_p)
    def stand_still(_):
        released.wait(hold_s)

    with driver.context(), driver.stream() as stream:
        memory = cuda.Legacy(driver, 4096)
        driver.cuLaunchHostFunc(stream, ctypes.cast(stand_still, c_void_p), None)
        slowest, queued, begin = 0.0, 0, time.perf_counter()
        while queued < most and time.perf_counter() - begin < hold_s - 1:
            start = time.perf_counter()
            driver.cuMemsetD8Async(memory.address, 1, 64, stream)
            slowest = time.perf_counter() - start
            queued += 1
            if slowest > slow_s:
                break
        released.set()
        driver.cuStreamSynchronize(stream)
        memory.free()
    return {"calls_before_one_waited": queued, "that_one_ms": round(slowest * 1e3, 1), "one_waited": slowest > slow_s,
            "stood_still_s": hold_s}


def exporter_death():
    """What an importer finds in memory of a process that was killed."""
    size = 4 * MIB

    def exporter_of(kind):
        def exporter(driver, peer):
            memory = cuda.Legacy(driver, size) if kind == "legacy" else cuda.Segment(driver, size)
            driver.write(memory.address, b"\x5a" * 64)
            peer.say({"pid": os.getpid(), "handle": memory.handle().hex() if kind == "legacy" else ""},
                     [] if kind == "legacy" else [memory.fd])
            signal.pause()
        return exporter

    def importer_of(kind):
        def importer(driver, peer):
            message, fds = peer.hear()
            opened = cuda.OpenedLegacy(driver, bytes.fromhex(message["handle"])) if kind == "legacy" \
                else cuda.Segment(driver, size, fds[0])
            os.kill(message["pid"], signal.SIGKILL)
            result = {"dies": True}
            try:
                peer.hear()
            except (EOFError, OSError):
                pass
            # The driver tears a context down after its process is gone.
            for wait_s in (0.0, 0.5, 1.5):
                time.sleep(wait_s)
                try:
                    result[f"after_{wait_s}_s"] = "intact" if driver.read(opened.address, 64) == b"\x5a" * 64 else "other"
                except cuda.CudaError as error:
                    result[f"after_{wait_s}_s"] = str(error)
            try:
                opened.close()
                result["closes"] = True
            except cuda.CudaError as error:
                result["closes"] = str(error)
            return result
        return importer

    facts = {}
    for kind in ("vmm", "legacy"):
        facts[kind] = pair(exporter_of(kind), importer_of(kind), (os.getuid(),) * 2)
    kept = [value for key, value in facts["vmm"].items() if key.startswith("after_")]
    if not kept or set(kept) != {"intact"}:
        raise Failed(facts, "a segment's bytes do not outlive its process, on which refit relies")
    return facts


QUESTIONS = {
    "devices": devices,
    "users_vmm": lambda: users("vmm"),
    "users_legacy": lambda: users("legacy"),
    "small_allocations": small_allocations,
    "exporter_death": exporter_death,
    "costs": costs,
    "full_queue": full_queue,
}


def answer(name):
    try:
        facts = QUESTIONS[name]()
        broken = facts.get("error") if isinstance(facts, dict) else None
        return {"facts": facts, "failed": broken}
    except NotRun as why:
        return {"facts": {}, "not_run": str(why)}
    except cuda.NoDriver as why:
        return {"facts": {}, "not_run": str(why)}
    except Failed as why:
        return {"facts": why.facts, "failed": str(why)}
    except cuda.CudaError as why:
        return {"facts": {}, "failed": str(why)}


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1])), flush=True)
