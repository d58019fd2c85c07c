"""Packs this source tree and what it is built with, for a host that has a compiler, CMake and no package of ours.

Headers and archives come from this machine's Debian packages; cmake/carried_packages.cmake takes them. Nothing in the
pack names a path of this machine.
"""
import os
import pathlib
import re
import subprocess
import tarfile
import tempfile

FOLDER = "refit-gpu-check"

# Package and what of it is carried: folders or files below /usr/include, archives.
HEADERS = {
    "nlohmann-json3-dev": ["nlohmann"],
    "libcli11-dev": ["CLI"],
    "libexpected-dev": ["tl"],
    "libtomlplusplus-dev": ["toml++"],
    "libflatbuffers-dev": ["flatbuffers"],
    "libxxhash-dev": ["xxhash.h", "xxh3.h"],
    "libre2-dev": ["re2"],
    "libssl-dev": ["openssl"],
    "libsystemd-dev": ["systemd"],
    "libgtest-dev": ["gtest"],
}
ARCHIVES = ["libcrypto.a", "libre2.a", "libgtest.a", "libgtest_main.a"]
# There is no archive of this one: it, and what it needs, for hosts without it.
SHARED = ["libsystemd.so.0", "libcap.so.2", "libgcrypt.so.20", "libgpg-error.so.0", "liblz4.so.1", "liblzma.so.5",
          "libzstd.so.1"]
# Of a CUDA toolkit, for hosts whose PyTorch brings no headers of CUDA 13. NVIDIA's, so they stay out of anything public.
CUDA_HEADERS = ["cuda.h", "cudaTypedefs.h"]


class PackError(Exception):
    """Says what is missing and how to get it."""


def output_of(command, **how):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode != 0:
        raise PackError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def source_files(root):
    """What git knows or would take; a tree without git is taken as it is, less what was built there."""
    if (root / ".git").exists():
        listed = output_of(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        names = sorted(name for name in listed.split("\0") if name)
    else:
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        names = [name for name in names if pathlib.PurePath(name).parts[0] not in ("build", "carried")]
    return [name for name in names if (root / name).is_file() and pathlib.PurePath(name).parts[0] != "carried"]


def boost_files(root, include):
    """Boost's headers that this source reaches. Whole folders, because which files of one are read is the compiler's
    and the C++ library's to say; only the first level is chosen."""
    wanted = set()
    for folder in ("core", "client", "daemon"):
        for path in (root / folder).rglob("*.[ch]pp"):
            wanted.update(re.findall(r"#include <(boost/[^>]+)>", path.read_text()))
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as probe:
        probe.write("".join(f"#include <{name}>\n" for name in sorted(wanted)))
        probe.flush()
        reached = output_of(["c++", "-std=c++20", "-M", probe.name])
    firsts = {match.group(1) for match in re.finditer(r"/boost/([^/\s\\]+)", reached)}
    files = []
    for first in sorted(firsts):
        path = include / "boost" / first
        files += [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return files


def library_folder():
    return pathlib.Path("/usr/lib") / output_of(["c++", "-print-multiarch"]).strip()


def cuda_include():
    for folder in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (pathlib.Path(folder) / "include" / "cudaTypedefs.h").exists():
            return pathlib.Path(folder) / "include"
    return None


def kernels(root, scratch):
    """The fatbin, compiled here for a host whose nvcc is too old or not there; nothing where there is none here."""
    build = pathlib.Path(scratch) / "build"
    said = output_of(["cmake", "-S", str(root), "-B", str(build), "-DREFIT_TORCH=OFF", "-DREFIT_TESTS=OFF",
                      "-DREFIT_BENCH=OFF"])
    if "Kernels are left out" in said or "CUDA's headers not found" in said:
        return None
    output_of(["cmake", "--build", str(build), "--target", "refit_kernels"])
    return build / "core" / "kernels.fatbin"


def carried_files(root, scratch):
    """(name below carried/, path here) of everything that is carried."""
    include, library = pathlib.Path("/usr/include"), library_folder()
    found = []
    for package, names in HEADERS.items():
        for name in names:
            path = include / name
            if not path.exists():
                raise PackError(f"no {path}: install {package} (scripts/setup)")
            inside = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            found += [(f"include/{file.relative_to(include)}", file) for file in inside]
    # OpenSSL's configuration differs by architecture, and Debian keeps it apart.
    multiarch = include / library.name
    found += [(f"include/{file.relative_to(multiarch)}", file) for file in sorted((multiarch / "openssl").rglob("*.h"))]
    found += [(f"include/{file.relative_to(include)}", file) for file in boost_files(root, include)]
    for name in ARCHIVES:
        found.append((f"lib/{name}", library / name))
    for name in SHARED:
        found.append((f"lib/systemd/{name}", library / name))
    for name, path in found:
        if not path.exists():
            raise PackError(f"no {path}, to be carried as {name}: run scripts/setup")
    subprocess.run(["flatc", "--cpp", "--scoped-enums", "--cpp-std", "c++17", "-o", scratch,
                    str(root / "schema" / "refit.fbs")], check=True)
    found.append(("generated/refit_generated.h", pathlib.Path(scratch) / "refit_generated.h"))
    if cuda := cuda_include():
        found += [(f"cuda/include/{name}", cuda / name) for name in CUDA_HEADERS]
        if fatbin := kernels(root, scratch):
            found.append(("cuda/kernels.fatbin", fatbin))
    for package in list(HEADERS) + ["libboost-dev", "libsystemd0"]:
        licence = pathlib.Path("/usr/share/doc") / package / "copyright"
        if licence.exists():
            found.append((f"licences/{package}", licence))
    return found


def add(tar, name, path):
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    real = pathlib.Path(path).resolve()
    info.size = real.stat().st_size
    info.mode = 0o755 if os.access(real, os.X_OK) else 0o644
    with open(real, "rb") as file:
        tar.addfile(info, file)


def write(root, target):
    """Writes the pack to `target`, a .tar, or a .tar.gz or .tar.xz by its name. Returns its number of files."""
    kind = {".gz": "w:gz", ".xz": "w:xz"}.get(pathlib.Path(target).suffix, "w")
    with tempfile.TemporaryDirectory() as scratch:
        carried = carried_files(root, scratch)
        sources = source_files(root)
        with tarfile.open(target, kind) as tar:
            for name in sources:
                add(tar, name, root / name)
            for name, path in carried:
                add(tar, f"carried/{name}", path)
    return len(sources) + len(carried)
