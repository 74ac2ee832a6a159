"""The random numbers of torch's CPU generator, drawn several times as fast: operators for compiled programs.

A thread that draws by torch's own functions at the same time may be handed some of the same numbers: the generator's
lock is out of reach here.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from pyrovae.infer.machine import with_tried_instructions

__all__ = ["bernoullis", "can_draw", "normals", "uniforms"]

_one_at_a_time = threading.RLock()

# The compiler must neither merge nor drop them.
_library = torch.library.Library("pyrovae", "FRAGMENT")
_TAGS = (torch.Tag.nondeterministic_seeded,)
_library.define("uniforms(int count) -> Tensor", tags=_TAGS)
_library.define("normals(int count) -> Tensor", tags=_TAGS)
_library.define("bernoullis(Tensor probs) -> Tensor", tags=_TAGS)


# Each goes on as torch does where it cannot be faster: a program that is kept on disk may meet a machine that has lost
# its compiler.


@torch.library.impl(_library, "uniforms", "CompositeExplicitAutograd")
def _uniforms(count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    return out if can_draw() and _draw("uniforms", out) else out.uniform_()


@torch.library.impl(_library, "normals", "CompositeExplicitAutograd")
def _normals(count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    return out if can_draw() and _draw("normals", out) else out.normal_()


@torch.library.impl(_library, "bernoullis", "CPU")
def _bernoullis(probs: Tensor) -> Tensor:
    out = torch.empty_like(probs)
    # A probability that is none is left to torch, which says so.
    drawn = can_draw() and probs.is_contiguous() and _draw("bernoullis", out, probs)
    return out if drawn else torch.bernoulli(probs)


@torch.library.register_fake("pyrovae::uniforms")
@torch.library.register_fake("pyrovae::normals")
def _(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


@torch.library.register_fake("pyrovae::bernoullis")
def _(probs: Tensor) -> Tensor:
    return torch.empty_like(probs)


uniforms = torch.ops.pyrovae.uniforms.default
"""``torch.rand(count)``, float32."""
normals = torch.ops.pyrovae.normals.default
"""``torch.randn(count)``, float32, to rounding of the angle in Box and Muller's transform (3e-6)."""
bernoullis = torch.ops.pyrovae.bernoullis.default
"""``torch.bernoulli(probs)``, float32, contiguous."""


def can_draw() -> bool:
    """Whether they are faster here: it takes a C++ compiler, and a torch whose numbers and states are as expected."""
    with _one_at_a_time:  # finding out draws, and puts the state back
        return _found_to_draw()


@cache
def _found_to_draw() -> bool:
    try:
        return _draws_as_torch()
    except Exception:  # whatever is missing, torch's own will do
        return False


@cache
def _compiled() -> ctypes.PyDLL:
    from torch._inductor.codecache import CppCodeCache  # keeps it on disk beside the programs

    code = files("pyrovae.infer").joinpath("noise.cpp").read_text(encoding="utf-8")
    # torch's own flags are for code that is vectorised already.
    flags = ("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")
    with with_tried_instructions():
        compiled = ctypes.PyDLL(CppCodeCache.load(code, extra_flags=flags)._name)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    compiled.uniforms.argtypes = compiled.normals.argtypes = [pointer, pointer, number]
    compiled.bernoullis.argtypes = [pointer, pointer, number, pointer]
    for function in (compiled.uniforms, compiled.normals, compiled.bernoullis):
        function.restype = ctypes.c_bool
    return compiled


def _draw(name: str, out: Tensor, *inputs: Tensor) -> bool:
    """Fill ``out`` with the generator's next numbers. Where that fails, the generator is as it was."""
    function = getattr(_compiled(), name)
    with _one_at_a_time:
        state = torch.default_generator.get_state()
        pointers = [x.data_ptr() for x in (state, out, *inputs)]
        drawn = all(pointers) and function(*pointers[:2], out.numel(), *pointers[2:])
        if drawn:
            torch.default_generator.set_state(state)
    return drawn


def _draws_as_torch() -> bool:
    """Compares numbers, and the states after them, from several places of a state on."""
    generator = torch.default_generator
    with torch.random.fork_rng(devices=[]):
        generator.manual_seed(0)
        for count in (16, 1000, 5001):
            probs = torch.full((count,), 0.3, dtype=torch.float32, device="cpu")
            start = generator.get_state()
            theirs = torch.empty_like(probs).uniform_(), torch.empty_like(probs).normal_(), torch.bernoulli(probs)
            end = generator.get_state()
            generator.set_state(start)
            ours = [torch.empty_like(probs) for _ in theirs]
            drawn = [_draw("uniforms", ours[0]), _draw("normals", ours[1]), _draw("bernoullis", ours[2], probs)]
            close = [torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(ours, theirs, strict=True)]
            if not (all(drawn) and all(close) and torch.equal(generator.get_state(), end)):
                return False
    return True
