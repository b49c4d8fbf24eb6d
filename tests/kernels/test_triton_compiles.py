"""The kernels compile for GPUs, down to machine code: that needs none, and finds what the interpreter lets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# What a kernel is compiled for: bits, those that a value depends on, scales of 8 bits, shifts, dtype, indices, and of a
# product which way.
CASES: list[tuple[int, int, bool, bool, str, str, bool]] = [
    (2, 2, True, False, "bf16", "int32", False),
    (2, 8, True, False, "bf16", "int32", False),
    (3, 9, False, False, "fp16", "int64", True),
    (3, 3, True, True, "fp16", "int64", True),
    (4, 4, False, False, "fp32", "int32", True),
    (8, 8, False, True, "bf16", "int32", False),
]
SIZES = ("numel", "blocksize", "rows", "outs", "terms", "terms_a_part", "width")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "memory", "double", "shifted", "dtype", "index", "transposed"), CASES)
def test_kernels_compile(
    bits: int,
    memory: int,
    double: bool,
    shifted: bool,
    dtype: str,
    index: str,
    transposed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_kit.kernels import on_cuda, triton_code

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stored = "*u8" if double else "*fp32"
    types = {"x": f"*{dtype}", "codes": "*u8", "table": "*fp32", "scales_table": "*fp32", **dict.fromkeys(SIZES, "i32")}
    constants = {"BITS": bits, "MEMORY": memory, "DOUBLE": double, "SHIFTED": shifted}
    constants["INDEX"] = getattr(triton_code.tl, index)
    for name, there in (("scales", True), ("shifts", shifted)):
        types |= {name: stored, f"{name}_absmax": "*fp32", f"{name}_offset": "*fp32"}
        constants |= {} if there else {name: None}
        constants |= {} if there and double else {f"{name}_absmax": None, f"{name}_offset": None}
    constants |= {} if double else {"scales_table": None}
    flat = compiled(triton_code.dequantize, {**types, "out": f"*{dtype}"}, {**constants, "TILE": on_cuda._TILE}, 80)
    tiles = {"ROWS": on_cuda._ROWS, "OUTS": on_cuda._OUTS, "TERMS": on_cuda._TERMS}
    way = {"TRANSPOSED": transposed, "ONE_BLOCK": not transposed}
    product = compiled(triton_code.multiply, {**types, "out": "*fp32"}, {**constants, **tiles, **way}, 80)
    assert all(len(kernel.asm["cubin"]) > 0 for kernel in (flat, product))
    assert ("mma" in product.asm["ptx"]) == (dtype != "fp32"), "16-bit products are the tensor cores', float32's aren't"
    assert product.metadata.shared <= 64 << 10, "the least that GPUs with tensor cores give a program"
