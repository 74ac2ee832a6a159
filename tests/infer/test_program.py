"""Recording below Pyro: a record repeats the computation, reads every tensor anew, and refuses what it cannot hold."""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrovae import FunctionPair, Pair
from pyrovae.infer import program as program_module
from pyrovae.infer.program import Program, Untraceable, or_eagerly, say_once
from pyrovae.infer.rewrite import rewritten
from pyrovae.infer.snapshot import Writes
from pyrovae.infer.surroundings import Surroundings

X = torch.arange(1.0, 4.0)


def record(function: Callable, *args: Tensor) -> Program:
    return Program(function, args, Surroundings(function))


# --- what a record is ----------------------------------------------------------------------------


@pytest.mark.parametrize("torchs_context", [True, False])
def test_it_repeats_the_computation_and_draws_anew(torchs_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's internals, which it is quicker with, and without."""
    if not torchs_context:
        monkeypatch.delattr("torch._guards.tracing")

    def function(x: Tensor) -> Tensor:
        return x + torch.randn(3) + pyro.sample("z", dist.Normal(x, 1.0))

    program = record(function, X)
    pyro.set_rng_seed(3)
    expected = [function(X), function(2 * X)]
    pyro.set_rng_seed(3)
    actual = [program(X), program(2 * X)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_it_reads_tensors_anew() -> None:
    weight, table = nn.Parameter(torch.ones(3)), torch.ones(3)
    program = record(lambda x: (x * weight + table).sum(), X)
    with torch.no_grad():
        weight.fill_(2.0)
        table.fill_(10.0)
    assert program(X) == 2 * 6 + 30


def test_recording_draws_no_random_numbers() -> None:
    def function(x: Tensor) -> Tensor:
        return x * torch.rand(())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    record(function, X)
    with pytest.raises(Untraceable):
        record(lambda x: x * np.random.rand() * random.random(), X)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_recording_leaves_buffers_and_attributes_alone() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.calls = 0
            self.log: list[float] = []

        def counted(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(1.0)
            return self.norm(x).sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).sum()

    module = Module()
    record(module.forward, torch.randn(4, 2))
    with pytest.raises(Untraceable, match=r"it changes Module\.log as it runs"):
        record(module.counted, torch.randn(4, 2))
    assert torch.equal(module.norm.running_mean, torch.zeros(2))
    assert torch.equal(module.norm.running_var, torch.ones(2))
    assert module.norm.num_batches_tracked == 0
    assert module.calls == 0
    assert module.log == []


def test_what_is_made_once_at_first_use_may_be_recorded() -> None:
    class Lazy(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(3)
            return x + self.table

    assert torch.equal(record(Lazy().forward, X)(X), X + 1)


def test_a_function_of_no_arguments() -> None:
    weights = [torch.ones(3), torch.full((3,), 2.0)]
    program = record(lambda: weights[0] + weights[1])
    weights[1].fill_(5.0)
    assert torch.equal(program(), torch.full((3,), 6.0))


# --- what no record can hold ---------------------------------------------------------------------


class Counter:
    value = 0
    values: ClassVar = [0]
    hidden = ContextVar("hidden", default=0)  # what is in it is not watched


RATE = torch.tensor(2.0)  # as a buffer of a module that lies outside, and that the record would otherwise hold fixed


def count(x: Tensor) -> Tensor:
    Counter.value += 1
    return x * Counter.value


def count_in_list(x: Tensor) -> Tensor:
    Counter.values[0] += 1
    return x * Counter.values[0]


def count_on(x: Tensor) -> Tensor:
    Counter.hidden.set(Counter.hidden.get() + 1)
    return x * Counter.hidden.get()  # the line to name


def grow(x: Tensor) -> Tensor:
    Counter.hidden.set(Counter.hidden.get() + 1)
    for _ in range(Counter.hidden.get()):
        x = x.sin()
    return x


REFUSED = {
    "item": (
        lambda x: x * x.sum().item(),
        r"the value of a tensor into Python.*, at test_program.py:\d+: `.*item",
    ),
    "float": (lambda x: x * float(x.sum()), r"reads the value of a tensor.*, at test_program.py:\d+: `.*float"),
    "if": (lambda x: x if x.sum() > 0 else -x, r"reads the value of a tensor.*, at test_program.py:\d+: `.*if"),
    "numpy": (lambda x: x * float(x.numpy().sum()), r"reads the values of a tensor.*numpy.*, at test_program.py:\d+"),
    "asarray": (lambda x: x * np.asarray(x).sum(), r"reads the values of a tensor.*, at test_program.py:\d+"),
    "tolist": (lambda x: x * sum(x.tolist()), r"reads the values of a tensor.*tolist.*, at test_program.py:\d+"),
    "item of another": (lambda x: x * RATE.item(), r"the value of a tensor into Python.*, at test_program.py:\d+"),
    "float of another": (lambda x: x * float(RATE), r"the value of a tensor into Python.*, at test_program.py:\d+"),
    "numpy of another": (lambda x: x * np.exp(RATE), r"reads the values of a tensor.*, at test_program.py:\d+"),
    "numpy float of another": (lambda x: x * np.float64(RATE), r"the value of a tensor.*, at test_program.py:\d+"),
    "a number that torch wants": (lambda x: torch.add(x, x, alpha=RATE), r"the value of a tensor.*, at test_program"),
    "tensor of tensors": (
        lambda x: x * torch.tensor([RATE, 1.0, x.sum()]),
        r"a tensor of a list of tensors.*, at test_program",
    ),
    "new_tensor": (
        lambda x: x * x.new_tensor([RATE, 1.0, 1.0]),
        r"a tensor of a list of tensors.*, at test_program.py:\d+",
    ),
    "tensor of data": (lambda x: x * torch.tensor(data=[RATE, 1.0, 1.0]), r"a tensor of a list of tensors.*, at test_"),
    "numpy that writes": (lambda x: (m := torch.zeros(3), m.numpy().fill(2.0), x * m)[-1], r"numpy.*, at test_program"),
    "Tensor of tensors": (lambda x: x * torch.Tensor([RATE, 1.0, 1.0]), r"value of a tensor.*, at test_program.py:\d+"),
    "counter": (count, r"it changes Counter\.value as it runs"),
    "counter in a list": (count_in_list, r"it changes Counter\.values as it runs"),
    "hidden counter": (count_on, r"something else each time it runs, at test_program.py:\d+: `return x .*  # the"),
    "numpy noise": (lambda x: x * np.random.rand(), r"something else each time.*, at test_program.py:\d+"),  # noqa: NPY002
    "numpy tensor": (lambda x: x * torch.from_numpy(np.random.rand(3)), "other numbers each time it runs"),  # noqa: NPY002
    "random list": (lambda x: x * torch.tensor([random.random()]), "other numbers each time it runs"),
    "more and more": (grow, "something else each time it runs: first `.*`, then `"),
    "an error": (lambda x: x @ torch.ones(4), r"size.*, at test_program.py:\d+"),
}


@pytest.mark.parametrize(("function", "match"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(function: Callable, match: str) -> None:
    with pytest.raises(Untraceable, match=match):
        record(function, X)


def test_constants_may_be_read() -> None:
    program = record(lambda x: x * torch.tensor([1.0, torch.tensor(2.0), 4.0]) + int(torch.tensor(3)), X)
    torch.testing.assert_close(program(2 * X), 2 * X * torch.tensor([1.0, 2.0, 4.0]) + 3)


def test_make_fx_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ImportError("no tracer here")

    monkeypatch.setattr(program_module, "make_fx", broken)
    with pytest.raises(Untraceable, match="no tracer here"):
        record(torch.sin, X)


# --- compiling -----------------------------------------------------------------------------------


def test_without_a_compiler_the_record_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    monkeypatch.setattr(program_module, "_said", set())
    program = record(torch.sin, X)
    with pytest.warns(RuntimeWarning, match=r"cannot compile the step here \(no C\+\+ compiler\); it runs recorded"):
        program.compile((X,))
    record(torch.cos, X).compile((X,))  # said once
    assert not program.is_compiled
    assert torch.equal(program(X), X.sin())


def test_where_the_fast_way_fails_the_plain_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    asked: list[dict] = []

    def compile_without_cpp(graph: Callable, inputs: list, options: dict) -> Callable:
        asked.append(options)
        if "cpp_wrapper" in options:
            raise NotImplementedError("an operation that C++ cannot call")
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile_without_cpp)
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    program = record(torch.sin, X)
    program.compile((X,))
    assert ["cpp_wrapper" in options for options in asked] == [True, False]
    assert program.is_compiled
    assert logger.level == level
    assert torch.equal(program(X), X.sin())


def test_what_was_there_before_is_put_back_and_no_more() -> None:
    """A parameter is another tensor than the empty one that it is made of."""
    before = torch.ones(3)
    writes = Writes()
    with torch.no_grad(), writes:
        made = nn.Parameter(torch.empty(3))
        made.fill_(2.0)
        before.fill_(2.0)
    writes.put_back()
    assert torch.equal(made, torch.full((3,), 2.0))
    assert torch.equal(before, torch.ones(3))


def test_what_the_first_run_sets_up_stays() -> None:

    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "net"):
                self.net = nn.Linear(2, 2)
                nn.init.constant_(self.net.weight, 3.0)
            return self.net(x)

    lazy = Lazy()
    Program(lazy.forward, (torch.ones(1, 2),))
    assert torch.equal(lazy.net.weight, torch.full((2, 2), 3.0))


@pytest.mark.parametrize("file", ["<stdin>", "<ipython-input-1-0>"])
def test_lines_of_no_file_are_named(file: str) -> None:
    space: dict[str, Any] = {}
    exec(compile("def read(x):\n    return x * float(x.sum())", file, "exec"), space)  # as a prompt does
    with pytest.raises(Untraceable, match=rf"reads the value of a tensor.*, at {file}:2$"):
        Program(space["read"], (torch.ones(2),))


def test_one_hot_of_many_classes_takes_no_more_than_its_result() -> None:
    """No table of every class by every other."""
    words = torch.tensor([0, 99_999])
    program = Program(lambda x: nn.functional.one_hot(x, 100_000).float(), (words,))
    sizes = [node.meta["val"].numel() for node in rewritten(program.graph, [words]).graph.nodes if "val" in node.meta]
    assert max(sizes) == 2 * 100_000
    assert torch.equal(program(words).nonzero(), torch.tensor([[0, 0], [1, 99_999]]))


def test_a_long_compilation_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "MANY_OPERATIONS", 10)
    monkeypatch.setattr(program_module, "_compiled", lambda graph, inputs: graph)
    x = torch.ones(2)
    Program(lambda x: x + 1, (x,)).compile((x,))
    with pytest.warns(RuntimeWarning, match=r"the step has 1[23] operations.*takes minutes. backend='eager'"):
        Program(lambda x: sum((x.exp() for _ in range(5)), x), (x,)).compile((x,))


@pytest.mark.slow
def test_compiled_draws_keep_their_order() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        last, first = torch.randn(100_000), torch.randn(8)
        scale = (first * x).exp().sum()
        return scale, (last * scale).sum(), torch.randn(50_000).sum() * scale

    x = torch.randn(8)
    program = record(function, x)
    program.compile((x,))
    assert program.is_compiled
    state = torch.get_rng_state()
    expected = function(x)
    torch.set_rng_state(state)
    torch.testing.assert_close(program(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiled_equals_recorded() -> None:
    weight, norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = (norm(x) * weight * torch.randn(8, 3)).sum()
        return loss, *torch.autograd.grad(loss, [weight])

    x = torch.randn(8, 3)
    program = record(function, x)
    state = torch.get_rng_state()
    expected = program(x), norm.running_mean.clone()
    norm.reset_running_stats()
    program.compile((x,))
    assert program.is_compiled
    assert not norm.running_mean.any()  # compiling is a look too
    torch.set_rng_state(state)
    torch.testing.assert_close((program(x), norm.running_mean), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        pytest.param(
            lambda x: torch.linalg.cholesky(x) + 1,
            torch.eye(3),
            -torch.eye(3),
            id="cholesky",
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch compiles the check away"),
        ),
        pytest.param(
            lambda x: torch.bernoulli(x) + 1, torch.full((5000,), 0.5), torch.full((5000,), 1.5), id="bernoulli"
        ),
    ],
)
def test_a_compiled_error_is_the_eager_one(function: Callable, good: Tensor, bad: Tensor) -> None:
    program = record(function, good)
    program.compile((good,))
    assert program.is_compiled
    with pytest.raises(RuntimeError) as expected:
        function(bad)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        or_eagerly(program, function)(bad)
    state = torch.get_rng_state()
    with pytest.raises(Untraceable, match="its record does not run"):
        program(bad)
    assert torch.equal(torch.get_rng_state(), state)
    assert program(good).shape == good.shape


@pytest.mark.slow
def test_a_failed_compiled_run_changes_no_more_than_an_eager_one() -> None:
    counter = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        counter.add_(1)
        return torch.randn(5000).sum() + torch.bernoulli(x).sum()

    good, bad = torch.full((5000,), 0.5), torch.full((5000,), 1.5)
    program = record(function, good)
    found = []
    for run in (function, program):
        if run is program:
            program.compile((good,))
            assert program.is_compiled
        counter.zero_()
        torch.manual_seed(0)
        with pytest.raises(RuntimeError, match="p_in >= 0"):
            run(bad)
        found.append((float(counter), torch.randn(5)))
    assert found[1][0] <= found[0][0] == 1
    torch.testing.assert_close(*[after for _, after in found], rtol=0, atol=1e-5)


def test_a_record_that_fails_is_not_run_again() -> None:
    counter = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        counter.add_(1)
        return torch.bernoulli(x)

    program = record(function, torch.full((3,), 0.5))
    counter.zero_()
    with pytest.raises(RuntimeError, match="p_in >= 0"):
        program(torch.full((3,), 1.5))
    assert counter == 1


def test_say_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_said", set())
    with pytest.warns(RuntimeWarning, match="hello"):
        say_once("hello")
    say_once("hello")  # warnings are errors here


# --- surroundings --------------------------------------------------------------------------------

LEVEL = 1.0


def plain(x: Tensor) -> Tensor:
    return x * LEVEL


class Annealed(Pair):
    beta = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        self.temperature = 0.5
        self.register_buffer("weight", torch.ones(()))

    def model(self, x: Tensor) -> None: ...


def changes(surroundings: Surroundings, change: Callable[[], object]) -> str:
    """What is seen of a change; empty where nothing is."""
    before = surroundings.state()
    change()
    after = surroundings.state()
    return surroundings.difference(*(surroundings.states[i] for i in (before, after)))


def test_attributes_of_a_pair_are_watched() -> None:
    pair = Annealed()
    surroundings = Surroundings(pair.model, pair.guide)
    see = partial(changes, surroundings)
    assert see(lambda: None) == ""
    assert see(lambda: setattr(pair, "temperature", 0.25)) == "Annealed.temperature"
    assert see(lambda: setattr(pair, "temperature", 1 / 4)) == ""
    assert see(lambda: setattr(pair, "temperature", float("0.25"))) == ""
    assert see(lambda: setattr(pair, "beta", 0.5)) == "Annealed.beta"  # a new one, of the instance
    assert see(lambda: setattr(pair.net[1], "p", 0.1)) == "Dropout.p"
    assert "Sequential.training" in see(pair.net.eval)
    assert see(lambda: pair.weight.fill_(0.5)) == ""  # a record reads it
    assert see(lambda: setattr(pair, "weight", torch.ones(()))) == "Annealed.weight"
    assert see(lambda: pair.load_state_dict(pair.state_dict())) == ""

    def exchange() -> None:  # as many attributes as before
        del pair.temperature
        pair.heat = 0.5

    assert see(exchange) != ""
    assert see(lambda: setattr(pair, "heat", 0.1)) == "Annealed.heat"
    assert see(lambda: setattr(pair, "net", nn.Sequential(nn.Dropout()))) != ""
    assert see(lambda: setattr(pair.net[0], "p", 0.1)) == "Dropout.p"


def test_a_state_that_comes_back_is_known() -> None:
    pair = Annealed()
    surroundings = Surroundings(pair.model)
    states = []
    for mode in (True, False, True, False):
        pair.train(mode)
        states.append(surroundings.state())
    assert states == [0, 1, 0, 1]


def test_globals_closures_and_functions_of_a_pair_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, net = 1.0, nn.Dropout()

    def guide(x: Tensor) -> Tensor:
        return net(x) * rate

    def slow_down() -> None:
        nonlocal rate
        rate = 0.5

    pair = FunctionPair(plain, guide)
    for surroundings in (Surroundings(plain, guide), Surroundings(pair.model, pair.guide)):
        monkeypatch.setitem(globals(), "LEVEL", 1.0)
        rate = 1.0
        net.train()
        see = partial(changes, surroundings)
        assert see(lambda: monkeypatch.setitem(globals(), "LEVEL", 2.0)) == "LEVEL"
        assert see(slow_down) == "rate"
        assert see(net.eval) == "Dropout.training"


def test_numbers_that_move_count_no_more_and_records_read_tensors() -> None:
    pair = Annealed()
    surroundings = Surroundings(pair.model)
    before = surroundings.state()
    pair.temperature = 0.25
    assert surroundings.let_move(before, surroundings.state(), torch.tensor)
    state = surroundings.state()
    program = Program(lambda x: x * pair.temperature, (X,), surroundings)
    for temperature in (0.25, 3.0, 2):
        pair.temperature = temperature
        assert surroundings.state() == state
        torch.testing.assert_close(program(X), X * temperature)
        assert pair.temperature is temperature
    pair.temperature = None  # no number: it counts again
    assert surroundings.state() != state
    assert not surroundings.hold()


def test_a_number_that_the_function_itself_changes_is_refused() -> None:
    pair = Annealed()

    def rebound(x: Tensor) -> Tensor:
        pair.temperature = pair.temperature * 0.5
        return x * pair.temperature

    def in_place(x: Tensor) -> Tensor:
        pair.temperature *= 0.5
        return x * pair.temperature

    for function in (rebound, in_place):
        surroundings = Surroundings(function, pair.model)
        before, pair.temperature = surroundings.state(), pair.temperature + 0.5
        assert surroundings.let_move(before, surroundings.state(), torch.tensor)
        number = pair.temperature
        with pytest.raises(Untraceable, match=r"it changes Annealed\.temperature as it"):
            Program(function, (X,), surroundings)
        assert pair.temperature is number
        assert surroundings.hold()
        assert not surroundings.let_move(before, surroundings.state(), torch.tensor)


def test_the_param_store_is_watched() -> None:
    surroundings = Surroundings(plain)
    pyro.param("a", torch.ones(()))
    see = partial(changes, surroundings)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    assert see(lambda: None) == ""
    assert see(lambda: pyro.get_param_store().set_state(state)) == "a"
    assert see(pyro.clear_param_store) == "a"


def test_keys_of_a_dict_are_watched() -> None:
    weights: dict[Any, float] = {"tanh": 1.0, "sin": 2.0}

    def function(x: Tensor) -> Tensor:
        for name, weight in weights.items():
            x = getattr(torch, name)(x) * weight if isinstance(name, str) else x + name.sum()
        return x

    surroundings = Surroundings(function)
    see = partial(changes, surroundings)
    assert see(lambda: weights.update(cos=weights.pop("sin"))) == "sin, cos"
    state = surroundings.state()
    weights["tanh"] = weights.pop("tanh")  # the last now
    assert surroundings.state() != state
    weights.clear()
    weights[torch.ones(2)] = 1.0
    state = surroundings.state()
    weights[torch.ones(2)] = weights.popitem()[1]  # tensors are not compared
    assert surroundings.state() != state


def test_what_is_set_up_at_the_first_use_stays() -> None:
    class Slotted:
        __slots__ = ("net",)

        def __call__(self, x: Tensor) -> Tensor:
            if not hasattr(self, "net"):
                self.net = nn.Tanh()
            return self.net(x)

    def with_cell() -> Callable:
        net: Any = None

        def function(x: Tensor) -> Tensor:
            nonlocal net
            try:
                net  # noqa: B018
            except NameError:
                net = nn.Tanh()
            return net(x)

        del net
        return function

    slotted = Slotted()
    for function in (lambda x: slotted(x), with_cell()):
        program = record(function, X)
        torch.testing.assert_close(program(X), X.tanh())
        torch.testing.assert_close(function(X), X.tanh())


def test_a_list_is_put_back_before_the_entry_that_moves() -> None:
    weights = [0.5, 1.0]

    def function(x: Tensor) -> Tensor:
        first = weights[0]
        weights.clear()
        return x * first

    surroundings = Surroundings(function)
    before, weights[0] = surroundings.state(), 0.25
    assert surroundings.let_move(before, surroundings.state(), torch.tensor)
    surroundings.state()
    with pytest.raises(Untraceable):
        Program(function, (X,), surroundings)
    assert weights == [0.25, 1.0]
