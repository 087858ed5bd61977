#!/usr/bin/env python3
"""Writes the novels of the R package janeaustenr as text files, one per novel: extract_austen.py Rdata.rdb FOLDER

The file is R's lazy-load data base: per object a big-endian 32-bit length of what follows unpacked, then a zlib stream of R's
XDR serialization (version 3). Each object here is a character vector, one string per line of the novel."""
import os
import re
import struct
import sys
import zlib

STRSXP, CHARSXP, N_NOVELS = 16, 9, 6


def objects(data):
    """Yields the unpacked bytes of each object."""
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        unpack = zlib.decompressobj()
        unpacked = unpack.decompress(data[position + 4 :])
        if not unpack.eof or len(unpacked) != length:
            raise ValueError(f"object at byte {position}: {len(unpacked)} bytes unpacked, {length} promised")
        yield unpacked
        position = len(data) - len(unpack.unused_data)


def lines(serialized):
    """The strings of one serialized character vector."""
    if serialized[:2] != b"X\n" or struct.unpack_from(">I", serialized, 2)[0] != 3:
        raise ValueError("not R's XDR serialization, version 3")
    position = 14
    (length,) = struct.unpack_from(">I", serialized, position)  # name of the native encoding
    position += 4 + length
    flags, count = struct.unpack_from(">II", serialized, position)
    position += 8
    if flags & 255 != STRSXP:
        raise ValueError(f"R type {flags & 255}, not a character vector")
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", serialized, position)
        position += 8
        if flags & 255 != CHARSXP:
            raise ValueError(f"R type {flags & 255} inside a character vector")
        length = max(length, 0)  # -1 is NA
        if position + length > len(serialized):
            raise ValueError("a string runs past the end")
        yield serialized[position : position + length].decode("utf-8")
        position += length
    if position != len(serialized):
        raise ValueError(f"{len(serialized) - position} bytes are left over")


def main(source, folder):
    with open(source, "rb") as file:
        novels = ["\n".join(lines(o)) + "\n" for o in objects(file.read())]
    if len(novels) != N_NOVELS or min(map(len, novels)) < 300_000:
        raise ValueError(f"{len(novels)} novels, the shortest of {min(map(len, novels), default=0)} characters: not the six expected")
    for text in novels:
        title = re.sub(r"[^a-z]+", "-", text.split("\n", 1)[0].lower()).strip("-")
        path = os.path.join(folder, title + ".txt")
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".part", path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: extract_austen.py Rdata.rdb FOLDER")
    try:
        main(sys.argv[1], sys.argv[2])
    except (OSError, ValueError, struct.error, zlib.error) as error:
        sys.exit(f"extract_austen.py: {sys.argv[1]}: {error}")
