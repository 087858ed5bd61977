#!/usr/bin/env python3
"""Writes src/text/unicode_tables.c: the class (letter, number, white space, mark) of every code point.

Source of the data: the `regex` package (pip install regex), so that \\p{L}, \\p{N}, \\s and \\p{M} mean what they mean
in the published pre-tokenizer patterns. Usage: scripts/make_unicode_tables.py > src/text/unicode_tables.c
"""

import regex

CLASSES = ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s"), (4, r"\p{M}"))
PAGE = 256


def main():
    classes = bytearray(0x110000)
    for number, pattern in CLASSES:
        compiled = regex.compile(pattern)
        for cp in range(0x110000):
            if not 0xD800 <= cp < 0xE000 and compiled.match(chr(cp)):
                classes[cp] = number
    pages, index = [], []
    numbers = {}
    for start in range(0, 0x110000, PAGE):
        page = bytes(classes[start : start + PAGE])
        if page not in numbers:
            numbers[page] = len(pages)
            pages.append(page)
        index.append(numbers[page])
    assert len(pages) <= 256
    print('#include "text/unicode.h"\n')
    print("/* Made by scripts/make_unicode_tables.py. */\n")
    print(f"const uint8_t unicode_page_index[{len(index)}] = {{")
    for i in range(0, len(index), 32):
        print("    " + ", ".join(str(v) for v in index[i : i + 32]) + ",")
    print("};\n")
    print("/* Two code points a byte, the even one in the low half. */")
    print(f"const uint8_t unicode_pages[{len(pages)}][{PAGE // 2}] = {{")
    for page in pages:
        packed = [page[i] | page[i + 1] << 4 for i in range(0, PAGE, 2)]
        rows = [", ".join(str(v) for v in packed[i : i + 32]) for i in range(0, len(packed), 32)]
        print("    {" + ",\n     ".join(rows) + "},")
    print("};")


if __name__ == "__main__":
    main()
