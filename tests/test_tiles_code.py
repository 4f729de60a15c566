# SPDX-License-Identifier: Apache-2.0
"""What compilers make of the tile kernel's loops (csrc/cpu/kernel/attend_tiles.h). Its speed hangs
on their order of instructions, which no result shows; no machine with tiles need be at hand."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
PRODUCTS = ("item_scores", "item_output")


@pytest.fixture(scope="module", params=COMPILERS)
def functions(request, tmp_path_factory):
    """{name: instructions} of isa_amx.c, compiled as setup.py does."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AMX is x86-64")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    avx512 = re.search(r'^AVX512 = "(.*)"', setup, re.MULTILINE).group(1)
    flags = f"-std=c11 -O3 -ffp-contract=off -fPIC -Icsrc/include -Icsrc {avx512} -mavx512bf16"
    out = tmp_path_factory.mktemp("code") / "isa_amx.s"
    command = [request.param, *flags.split(), "-S", "csrc/cpu/isa_amx.c", "-o", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    found, lines = {}, []
    for line in out.read_text().splitlines():
        if label := re.match(r"([a-z]\w*)(\.\w+)*:", line):  # item_scores.cold is a part of its own
            lines = found.setdefault(label.group(0)[:-1], [])
        elif re.match(r"\s+[a-z]", line):
            lines.append(line.strip())
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_nothing_is_called_but_the_rare_path(functions, name):
    code = functions[name] + functions.get(name + ".cold", [])
    called = {re.match(r"\w+", x.split()[1]).group(0) for x in code if x.startswith("call")}
    assert called == {"raise_row"}


@pytest.mark.parametrize("name", PRODUCTS)
def test_stores_run_beside_products(functions, name):
    """Between two stores of a group there is a product."""
    code = functions[name]
    tiles = [x.split()[0] for x in code if re.match("tdpbf16ps|tilestored", x)]
    assert tiles.count("tilestored") == 4, "the exchange of one group, written once"
    assert "tilestored tilestored" not in " ".join(tiles)
    assert len([x for x in code if x.startswith("prefetcht1")]) >= 1


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_vector_is_spilled(functions, name):
    """But a few constants, which are parked once for the rare path to bring back (clang: two)."""
    spills = [x for x in functions[name] if re.search(r"%[yz]mm\d+, *-?\w*\(%r[sb]p\)", x)]
    assert len(spills) <= 3, spills
