"""What a compiled library is linked with."""

import struct
from pathlib import Path

DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29


class Elf:
    """The dynamic symbols and dynamic entries of a 64-bit ELF file of this machine's byte order."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:5] == b"\x7fELF\x02", f"{path} is no 64-bit ELF file"
        (start,) = struct.unpack_from("=Q", self.data, 40)
        size, count = struct.unpack_from("=HH", self.data, 58)
        # name, type, flags, address, offset, size, link, info, alignment, size of an entry
        headers = [struct.unpack_from("=IIQQQQIIQQ", self.data, start + i * size)
                   for i in range(count)]  # fmt: skip
        self.undefined, self.defined, self.dynamic = set(), set(), {}
        for _, kind, _, _, offset, size, link, _, _, entry in headers:
            names = headers[link][4]
            if kind == 11:  # SHT_DYNSYM: name, info, other, section, value, size
                for at in range(offset + entry, offset + size, entry):
                    name, _, _, section = struct.unpack_from("=IBBH", self.data, at)
                    (self.defined if section else self.undefined).add(self.text(names + name))
            if kind == 6:  # SHT_DYNAMIC: tag, value
                for at in range(offset, offset + size, entry):
                    tag, value = struct.unpack_from("=QQ", self.data, at)
                    if tag in (DT_NEEDED, DT_RPATH, DT_RUNPATH):
                        self.dynamic.setdefault(tag, []).append(self.text(names + value))

    def text(self, start: int) -> str:
        return self.data[start : self.data.index(b"\0", start)].decode()
