#!/usr/bin/env python3
"""The structure of the source tree: test_house.py [BUILD_FOLDER]

Includes point only down the house and stop at a room's door, files and functions stay short, the public header stands alone,
examples see nothing else, shell scripts parse, and the libraries export exactly what the header declares. Every check is first tried on a planted
violation: one that finds nothing there fails."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# From the top to the ground (docs/architecture.md): a room may include the doors of rooms further down.
HOUSE = "cli serve eval gen store model attn kv index vq text gguf math base".split()
MAX_FILE_LINES = 1500
MAX_FUNCTION_LINES = 120

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)
CC = os.environ.get("CC", "cc")


def read(path):
    return path.read_text(encoding="utf-8")


def sources(root, *folders):
    return [path for folder in folders for path in sorted((root / folder).rglob("*.[ch]"))]


def includes(path):
    return INCLUDE.findall(read(path))


def check_includes(root):
    """What src/ includes: system headers, the public header, its own room, and the doors of rooms below."""
    for path in sources(root, "src"):
        name = path.relative_to(root)
        room = name.parts[1]
        if room not in HOUSE:
            yield f"{name}: {room} is not a room of the house ({' > '.join(HOUSE)})"
            continue
        for kind, included in includes(path):
            if kind == "<":
                continue
            target = included.split("/")[0]
            if "/" not in included or target not in HOUSE:
                yield f'{name}: "{included}" is not written as "ROOM/HEADER.h"'
            elif target != room and HOUSE.index(target) < HOUSE.index(room):
                yield f'{name}: "{included}" stands above {room}'
            elif target != room and included != f"{target}/{target}.h":
                yield f'{name}: "{included}" is behind the door "{target}/{target}.h"'


def check_public_header(root):
    """include/ and examples/ include system headers and <quarry/quarry.h> only."""
    for path in sources(root, "include", "examples"):
        name = path.relative_to(root)
        for kind, included in includes(path):
            if kind == '"' or ("/" in included and included != "quarry/quarry.h" and not included.startswith("sys/")):
                yield f"{name}: includes {included}; only system headers and <quarry/quarry.h> are public"


def check_files(root):
    for path in sources(root, "src", "include", "tests", "bench", "fuzz", "examples"):
        n = read(path).count("\n")
        if n > MAX_FILE_LINES:
            yield f"{path.relative_to(root)}: {n} lines, more than {MAX_FILE_LINES}"


def check_functions(root):
    """Relies on the formatting: a function's braces stand in the first column."""
    for path in sources(root, "src", "tests", "bench", "fuzz", "examples"):
        start = None
        for i, line in enumerate(read(path).split("\n"), 1):
            if line == "{" or re.match(r"[A-Za-z_].*\)\s*\{$", line):
                start = i
            elif line == "}" and start:
                if i - start > MAX_FUNCTION_LINES:
                    yield f"{path.relative_to(root)}:{start}: a function of {i - start} lines, more than {MAX_FUNCTION_LINES}"
                start = None


def check_header_compiles(root):
    """The public header compiles alone, in C11 and, where a C++ compiler is at hand, in C++17."""
    compilers = [(CC, "c", "c11")] + [(cxx, "c++", "c++17") for cxx in ("g++", "clang++") if shutil.which(cxx)][:1]
    for compiler, language, standard in compilers:
        command = [compiler, "-x", language, f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-"]
        run = subprocess.run(command + ["-I", root / "include"], input="#include <quarry/quarry.h>\n", text=True, capture_output=True)
        if run.returncode != 0:
            yield f"quarry/quarry.h alone in {standard}: {run.stderr.strip()}"


def check_scripts(root):
    """Every shell script parses: the demo's is run by nothing else here."""
    for path in [*sorted((root / "scripts").glob("*.sh")), root / ".ci/run"]:
        if path.exists():
            run = subprocess.run(["bash", "-n", path], text=True, capture_output=True)
            if run.returncode != 0:
                yield f"{path.relative_to(root)}: {run.stderr.strip()}"


def exported(library):
    table = "-D" if library.suffix == ".so" else "-g"
    run = subprocess.run(["nm", table, "--defined-only", library], text=True, capture_output=True, check=True)
    return {fields[-1] for fields in map(str.split, run.stdout.split("\n")) if len(fields) == 3}


def check_symbols(root, build):
    """Both libraries export what the public header declares, and nothing else."""
    declared = set(re.findall(r"^QUARRY_API\b[^;(]*?(\w+)\(", read(root / "include/quarry/quarry.h"), re.M))
    for name in ("libquarry.a", "libquarry.so"):
        found = exported(build / name)
        for symbol in sorted(found - declared):
            yield f"{name} exports {symbol}, which quarry.h does not declare"
        for symbol in sorted(declared - found):
            yield f"{name} lacks {symbol}, which quarry.h declares"


def plant(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def plant_libraries(build):
    source = build / "planted.c"
    source.write_text("void quarry_close(void);\nvoid helper(void);\nvoid quarry_close(void) {}\nvoid helper(void) {}\n")
    subprocess.run([CC, "-shared", "-fPIC", "-o", build / "libquarry.so", source], check=True)
    subprocess.run([CC, "-c", "-fPIC", "-o", build / "planted.o", source], check=True)
    subprocess.run(["ar", "rcs", build / "libquarry.a", build / "planted.o"], check=True)


# what is planted, and what the check must say about it
PLANTED = [
    (check_includes, "src/base/up.c", '#include "model/model.h"\n', "stands above"),
    (check_includes, "src/model/behind.c", '#include "attn/policies.h"\n', "behind the door"),
    (check_includes, "src/gen/loose.c", '#include "session.h"\n', "not written as"),
    (check_includes, "src/annex/annex.c", "", "not a room"),
    (check_public_header, "examples/nosy.c", '#include "gen/gen.h"\n', "nosy.c"),
    (check_public_header, "include/quarry/quarry.h", "#include <base/base.h>\n", "base/base.h"),
    (check_files, "src/base/long.c", "\n" * (MAX_FILE_LINES + 1), "long.c"),
    (check_functions, "src/base/tall.c", "void f(void)\n{\n" + "    ;\n" * MAX_FUNCTION_LINES + "}\n", "tall.c:2"),
    (check_scripts, "scripts/open.sh", 'name="`"\n', "scripts/open.sh"),
    (check_header_compiles, "include/quarry/quarry.h", "size_t n;\n", "c11"),
    (check_header_compiles, "include/quarry/quarry.h", "extern int this;\n#ifdef __cplusplus\n#error\n#endif\n", "c++17"),
]


def self_test():
    for check, name, text, expected in PLANTED:
        if expected == "c++17" and not (shutil.which("g++") or shutil.which("clang++")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            plant(root, name, text)
            found = list(check(root))
            if not any(expected in line for line in found):
                yield f"{check.__name__} does not see what was planted in {name}: {found}"
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        plant(root, "include/quarry/quarry.h", "QUARRY_API void quarry_close(void);\nQUARRY_API const char *quarry_open(int n);\n")
        plant_libraries(root)
        found = list(check_symbols(root, root))
        for expected in ("libquarry.a exports helper", "libquarry.so exports helper", "libquarry.a lacks quarry_open", "libquarry.so lacks quarry_open"):
            if not any(expected in line for line in found):
                yield f"check_symbols does not see: {expected}: {found}"


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    failures = list(self_test())
    for check in (check_includes, check_public_header, check_files, check_functions, check_scripts, check_header_compiles):
        failures += check(root)
    if len(sys.argv) > 1:
        failures += check_symbols(root, pathlib.Path(sys.argv[1]))
    print("\n".join(failures) or "the house stands")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
