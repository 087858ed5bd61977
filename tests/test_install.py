#!/usr/bin/env python3
"""What is installed is enough: test_install.py BUILD_FOLDER

Installs into an empty folder and builds the examples there with nothing but the installed header and each of the two libraries,
with the flags that quarry.pc gives."""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CC = os.environ.get("CC", "cc")


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def package_flags(pc, prefix):
    """The fields of a .pc file with its variables replaced, under another prefix than the one that was configured."""
    text = pc.read_text(encoding="utf-8")
    variables = dict(re.findall(r"^(\w+)=(.*)$", text, re.M), prefix=str(prefix))
    for _ in variables:
        text = re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], text)
    return {name: value.split() for name, value in re.findall(r"^([\w.]+): *(.*)$", text, re.M)}


def main(build):
    with tempfile.TemporaryDirectory() as folder:
        prefix = pathlib.Path(folder) / "usr"
        run("cmake", "--install", build, "--prefix", prefix)
        (pc,) = prefix.rglob("quarry.pc")
        flags = package_flags(pc, prefix)
        library = next(prefix.rglob("libquarry.a")).parent
        for source in sorted((ROOT / "examples").glob("*.c")):
            run(CC, "-std=c11", *flags["Cflags"], source, "-o", prefix / "shared", *flags["Libs"], f"-Wl,-rpath,{library}")
            run(CC, "-std=c11", *flags["Cflags"], source, "-o", prefix / "static", library / "libquarry.a", *flags["Libs.private"])
            linked = run("ldd", prefix / "shared")
            if str(library) not in linked:
                sys.exit(f"{source.name} does not use the installed library:\n{linked}")
        version = run(prefix / "bin/quarry", "--version")
        if flags["Version"][0] not in version:
            sys.exit(f"quarry.pc says version {flags['Version'][0]}, the program {version}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
