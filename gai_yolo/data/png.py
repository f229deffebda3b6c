"""What libpng would write to the terminal without naming the file, seen before it is asked.

Chunks as in the PNG specification, 5.3: length, type, data, CRC-32 of type and data.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_HEAD = struct.Struct(">I4s")
CRC = struct.Struct(">I")
UNUSED = b"iCCP"
"""The colour profile: OpenCV does not use it, and programs write wrong ones, of which libpng complains at each decoding."""


def quiet(data: bytes) -> bytes | None:
    """A PNG file without what makes libpng complain and changes no pixel; None where it is torn or rotten, which libpng refuses as well."""
    if not data.startswith(SIGNATURE):
        return None
    kept: list[bytes | memoryview] = [SIGNATURE]
    view, start = memoryview(data), len(SIGNATURE)
    while start + CHUNK_HEAD.size + CRC.size <= len(view):
        length, kind = CHUNK_HEAD.unpack_from(view, start)
        end = start + CHUNK_HEAD.size + length + CRC.size
        if end > len(view):
            return None
        is_sound = CRC.unpack_from(view, end - CRC.size)[0] == zlib.crc32(view[start + 4 : end - CRC.size])
        is_critical = not kind[0] & 0x20
        if not is_sound and is_critical:
            return None
        if is_sound and kind != UNUSED:
            kept.append(view[start:end])
        if kind == b"IEND":
            return data if sum(map(len, kept)) == len(data) else b"".join(kept)
        start = end
    return None
