"""A quantised decoder on the GPU, eager, compiled and replayed from CUDA graphs, against the program on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.torch_version import TorchVersion

pytest.importorskip("triton")

from tests.gpu.programs import TOLERANCE, on_cuda, optimized, run
from tests.helpers import assert_close
from tests.programs import ids

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_TOKEN = (1, 1)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [ONE_TOKEN, (2, 9), (3, 40)])
def test_eager_logits_are_those_of_the_cpu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = ids(*shape)
    expected = run(optimized(dtype, shape), x)
    got = run(on_cuda(optimized(dtype, shape)), x.cuda())
    assert got.is_cuda
    assert got.dtype == dtype
    assert_close(f"{shape}", expected, got.cpu(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_compiles_to_the_decode_kernels(dtype: torch.dtype) -> None:
    program, x = on_cuda(optimized(dtype, ONE_TOKEN)), ids(*ONE_TOKEN).cuda()
    compiled = torch.compile(program.module(), fullgraph=True)
    # A cached graph would bring no code to look at.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got, code = run_and_get_code(compiled, x)
    text = "\n".join(code)
    for kernel in ("product_kernel", "prepare_kernel"):
        assert kernel in text
    for kernel in ("matmul_kernel", "dequantize_kernel"):
        assert kernel not in text
    assert_close("compiled", run(program, x), got, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_tokens_compile_to_the_fused_product(dtype: torch.dtype) -> None:
    program, x = on_cuda(optimized(dtype, (2, 9))), ids(2, 9).cuda()
    compiled = torch.compile(program.module(), fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got, code = run_and_get_code(compiled, x)
    text = "\n".join(code)
    assert "matmul_kernel" in text
    assert "rotate_kernel" in text
    assert_close("compiled", run(program, x), got, TOLERANCE[dtype])


@pytest.mark.xfail(
    TorchVersion(torch.__version__) < "2.12", reason="Inductor of torch 2.11 gives other values, on a CPU too"
)
def test_a_free_length_is_compiled_once() -> None:
    program = on_cuda(optimized(torch.bfloat16, (2, 9), dynamic=True))
    compiled = torch.compile(program.module(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(ids(2, 9).cuda())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (9, 17, 40):
                x = ids(2, length).cuda()
                assert_close(f"{length} tokens", run(program, x), compiled(x), TOLERANCE[torch.bfloat16])
    assert counters["stats"]["unique_graphs"] == 1


def test_cuda_graphs_give_the_same_logits() -> None:
    program = on_cuda(optimized(torch.bfloat16, ONE_TOKEN))
    compiled = torch.compile(program.module(), fullgraph=True, mode="reduce-overhead")
    # The first calls warm up and record; what follows replays, with other tokens in the same buffers.
    with torch.no_grad():
        for seed in range(5):
            x = ids(*ONE_TOKEN, seed=seed).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(x).clone()
            assert_close(f"call {seed}", run(program, x), got, TOLERANCE[torch.bfloat16])
    assert counters["inductor"]["cudagraph_skips"] == 0
