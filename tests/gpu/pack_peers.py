# ruff: noqa: T201
"""Cut from a vLLM wheel what two peer backends need, small enough to carry to a GPU machine that cannot install vLLM.

    python tests/gpu/pack_peers.py vllm-0.33.0-*.whl OUT_DIR [--arch 90]

OUT_DIR on PYTHONPATH then holds a package `vllm` that the backends find and load as they do an installed one:

    vllm/third_party/triton_kernels/            unchanged
    vllm/_C_stable_libtorch.abi3.so             of each, the device code of one architecture and of the kernels named in KERNELS;
    vllm/_moe_C_stable_libtorch.abi3.so         host code and operators are unchanged, other kernels are not there any more
    vllm-0.33.0.dist-info/METADATA              so that importlib.metadata knows the version
    peers.tar.xz                                all of the above, to carry

Where a kernel has no code for the architecture, as vLLM's Marlin has none newer than sm80 but PTX, the driver compiles the newest
older PTX at the first launch, here as there. Needs Linux, xz and libzstd (device code in a wheel is compressed with it)."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

# Substrings of the kernels' mangled names. 562949953487106 is float4_e2m1f, 2814749767106568 float8_e8m0fnu, 1125899906909960 bf16:
# Marlin's instantiations for bf16 activations and MXFP4 weights.
KERNELS = {
    "_moe_C_stable_libtorch.abi3.so": (
        b"6MarlinILl1125899906909960ELl562949953487106ELl1125899906909960ELl2814749767106568E",
        b"moe_align_block_size",
        b"moe_sum",
    ),
    "_C_stable_libtorch.abi3.so": (b"gptq_marlin_repack_kernel", b"swigluoai_and_mul_kernel", b"act_and_mul_kernelIN3c108BFloat16"),
}
CONTAINER, ENTRY = 0xBA55ED50, struct.Struct("<HHIQI8xI8xQ8xQ")  # kind, version, header, payload, compressed, arch, flags, uncompressed
PTX, CUBIN = 1, 2
ZSTD, LZ4 = 0x8000, 0x2000  # in flags


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a fat binary: PTX or machine code of one translation unit for one architecture."""

    start: int
    payload: int
    end: int
    kind: int
    arch: int
    flags: int
    compressed: int
    uncompressed: int


def main(wheel: Path, out: Path, arch: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            if name.startswith("vllm/third_party/triton_kernels/") or (name.endswith(".dist-info/METADATA") and name.startswith("vllm-")):
                archive.extract(name, out)
        for library, kernels in KERNELS.items():
            image = bytearray(archive.read(f"vllm/{library}"))
            print(f"{library}: {len(image) / 2**20:.1f} MiB")
            cut(image, arch, kernels)
            (out / "vllm" / library).write_bytes(image)
    (out / "vllm/__init__.py").write_text(f'raise ImportError("{out.name} holds parts of vLLM for moebench; it is not vLLM")\n')
    tar = out / "peers.tar.xz"
    parts = sorted(path.name for path in out.iterdir())
    subprocess.run(["tar", "-C", str(out), "-cf", "-", *parts], check=True, stdout=(raw := (out / "peers.tar").open("wb")))
    raw.close()
    subprocess.run(["xz", "-9e", "-T1", str(out / "peers.tar")], check=True)
    print(f"{tar.stat().st_size / 2**20:.2f} MiB  {tar}")


def cut(image: bytearray, arch: int, kernels: tuple[bytes, ...]) -> None:
    """Zero, in place, every image but the best one for `arch` of the translation units that hold one of `kernels`."""
    seen: set[bytes] = set()
    kept = dropped = 0
    for entries in containers(image):
        usable = [e for e in entries if (e.arch == arch if e.kind == CUBIN else e.arch <= arch)]
        texts = {e.start: unpack(image, e) for e in entries}
        here = {kernel for kernel in kernels if any(kernel in text for text in texts.values())}
        best = max((e for e in usable if any(kernel in texts[e.start] for kernel in kernels)), key=lambda e: (e.kind, e.arch), default=None)
        if best is not None:
            seen |= here
            kind = "PTX" if best.kind == PTX else "cubin"
            what = ", ".join(sorted(kernel.decode()[:40] for kernel in here))
            print(f"  keeps {kind} sm{best.arch} {best.compressed / 1024:7.0f} KiB: {what}")
        for entry in entries:
            # with sm90 cubins beside sm90a ones a unit has two for arch 90: the same kernels are never in both
            if entry is best or (best is not None and entry.kind == CUBIN and entry in usable):
                kept += 1
                continue
            dropped += 1
            image[entry.payload : entry.end] = bytes(entry.end - entry.payload)
    if missing := set(kernels) - seen:
        raise SystemExit(f"no code for sm{arch} of {', '.join(sorted(k.decode() for k in missing))}; is this another vLLM?")
    print(f"  {kept} images kept, {dropped} dropped")


def containers(image: bytearray) -> Iterator[list[Entry]]:
    """The images of each translation unit, from the ELF section .nv_fatbin."""
    at, size = section(image, b".nv_fatbin")
    end = at + size
    while at < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", image, at)
        if magic != CONTAINER:
            at += 8
            continue
        entries, entry = [], at + header
        while entry < at + header + length:
            kind, _, head, payload, compressed, arch, flags, uncompressed = ENTRY.unpack_from(image, entry)
            entries.append(
                Entry(
                    start=entry,
                    payload=entry + head,
                    end=entry + head + payload,
                    kind=kind,
                    arch=arch,
                    flags=flags,
                    compressed=compressed or payload,
                    uncompressed=uncompressed,
                )
            )
            entry += head + payload
        yield entries
        at += header + length


def section(image: bytearray, name: bytes) -> tuple[int, int]:
    """Offset and size in the file of an ELF64 section."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    for offset, _, _, _, at, size in headers:
        if image[strings + offset : strings + offset + len(name) + 1] == name + b"\0":
            return at, size
    raise SystemExit(f"no section {name.decode()}; this library holds no device code")


def unpack(image: bytearray, entry: Entry) -> bytes:
    data = bytes(image[entry.payload : entry.payload + entry.compressed])
    if not entry.flags & ZSTD:
        if entry.flags & LZ4:
            raise SystemExit("device code compressed with LZ4 is older than the vLLM this was written for (0.33.0)")
        return data
    zstd = ctypes.CDLL(find_library("zstd") or "libzstd.so.1")
    zstd.ZSTD_decompress.restype = ctypes.c_size_t
    room = ctypes.create_string_buffer(entry.uncompressed)
    got = zstd.ZSTD_decompress(room, ctypes.c_size_t(entry.uncompressed), data, ctypes.c_size_t(len(data)))
    if got != entry.uncompressed:
        raise SystemExit(f"zstd gives {got} bytes instead of {entry.uncompressed}")
    return room.raw


if __name__ == "__main__":
    arguments = sys.argv[1:]
    wanted = int(arguments.pop(arguments.index("--arch") + 1)) if "--arch" in arguments else 90
    arguments = [a for a in arguments if a != "--arch"]
    if len(arguments) != 2:
        sys.exit(__doc__)
    main(Path(arguments[0]), Path(arguments[1]), wanted)
